//! Words to syntax.

use crate::Error;
use crate::lex::{Lexeme, Token, lex};
use crate::syntax::{
    Function, Instruction, Literal, Operand, Space, Statement, Text, Type, Variable,
};

/// Reads a whole text.
pub(crate) fn parse(source: &str) -> Result<Text, Error> {
    let mut parser = Parser {
        source,
        tokens: lex(source)?,
        at: 0,
    };
    let mut text = Text::default();
    while parser.at < parser.tokens.len() {
        parser.top(&mut text)?;
    }
    Ok(text)
}

struct Parser<'a> {
    source: &'a str,
    tokens: Vec<Lexeme<'a>>,
    at: usize,
}

impl<'a> Parser<'a> {
    fn peek(&self) -> Option<Token<'a>> {
        self.tokens.get(self.at).map(|t| t.token)
    }

    fn line(&self) -> u32 {
        let at = self.at.min(self.tokens.len().saturating_sub(1));
        self.tokens.get(at).map_or(0, |t| t.line)
    }

    fn error(&self, reason: impl Into<String>) -> Error {
        let line = self.line();
        let text = self
            .source
            .lines()
            .nth(line.saturating_sub(1) as usize)
            .unwrap_or_default();
        Error::Parse {
            line,
            text: text.trim().to_owned(),
            reason: reason.into(),
        }
    }

    fn next(&mut self) -> Result<Token<'a>, Error> {
        let token = self
            .peek()
            .ok_or_else(|| self.error("the text ends too early"))?;
        self.at += 1;
        Ok(token)
    }

    fn take(&mut self, sign: char) -> bool {
        let found = self.peek() == Some(Token::Sign(sign));
        self.at += usize::from(found);
        found
    }

    fn expect(&mut self, sign: char) -> Result<(), Error> {
        if self.take(sign) {
            Ok(())
        } else {
            Err(self.error(format!("expected '{sign}'")))
        }
    }

    fn word(&mut self) -> Result<&'a str, Error> {
        match self.peek() {
            Some(Token::Word(word)) => {
                self.at += 1;
                Ok(word)
            }
            _ => Err(self.error("expected a name or number")),
        }
    }

    fn skip_line(&mut self) {
        let line = self.line();
        while self.tokens.get(self.at).is_some_and(|t| t.line == line) {
            self.at += 1;
        }
    }

    fn integer(&mut self) -> Result<i64, Error> {
        let minus = self.take('-');
        let word = self.word()?;
        match literal(word) {
            Some(Literal::Integer(value)) if minus => Ok((value as i64).wrapping_neg()),
            Some(Literal::Integer(value)) => Ok(value as i64),
            _ => Err(self.error(format!("expected an integer, got {word}"))),
        }
    }

    fn top(&mut self, text: &mut Text) -> Result<(), Error> {
        let word = self.word()?;
        match word {
            ".version" | ".address_size" => {
                self.word()?;
            }
            ".target" => {
                self.word()?;
                while self.take(',') {
                    self.word()?;
                }
            }
            ".file" | ".loc" => {
                self.at -= 1;
                self.skip_line();
            }
            ".section" => while self.next()? != Token::Sign('}') {},
            ".pragma" => while self.next()? != Token::Sign(';') {},
            ".visible" | ".extern" | ".weak" | ".common" => {}
            ".entry" | ".func" => {
                let function = self.function(word == ".entry")?;
                // a prototype gives way to the body
                match text.functions.iter_mut().find(|f| f.name == function.name) {
                    Some(known) if known.body.is_none() => *known = function,
                    Some(_) if function.body.is_none() => {}
                    Some(_) => {
                        return Err(self.error(format!("{} is defined twice", function.name)));
                    }
                    None => text.functions.push(function),
                }
            }
            _ => {
                self.at -= 1;
                text.variables.append(&mut self.variables()?);
                self.expect(';')?;
            }
        }
        Ok(())
    }

    fn function(&mut self, entry: bool) -> Result<Function, Error> {
        let line = self.line();
        let returns = if !entry && self.take('(') {
            self.params()?
        } else {
            Vec::new()
        };
        let name = self.word()?.to_owned();
        let params = if self.take('(') {
            self.params()?
        } else {
            Vec::new()
        };
        let mut max_threads = None;
        loop {
            if self.take(';') {
                return Ok(Function {
                    name,
                    entry,
                    line,
                    returns,
                    params,
                    max_threads,
                    body: None,
                });
            }
            if self.take('{') {
                break;
            }
            match self.word()? {
                ".maxntid" | ".reqntid" => {
                    let mut count = self.integer()?;
                    while self.take(',') {
                        count = count.saturating_mul(self.integer()?);
                    }
                    max_threads = u32::try_from(count).ok();
                }
                ".minnctapersm" | ".maxnreg" | ".maxnctapersm" => {
                    self.integer()?;
                }
                ".noreturn" => {}
                ".pragma" => while self.next()? != Token::Sign(';') {},
                other => return Err(self.error(format!("unknown directive {other}"))),
            }
        }
        let body = Some(self.body()?);
        Ok(Function {
            name,
            entry,
            line,
            returns,
            params,
            max_threads,
            body,
        })
    }

    fn params(&mut self) -> Result<Vec<Variable>, Error> {
        let mut out = Vec::new();
        while !self.take(')') {
            out.append(&mut self.variables()?);
            self.take(',');
        }
        Ok(out)
    }

    /// `.space .align n .type name[n] = {…}`, without the end; several names only where a semicolon ends them.
    fn variables(&mut self) -> Result<Vec<Variable>, Error> {
        let line = self.line();
        let (mut space, mut align, mut kind, mut lanes) = (None, None, None, 1);
        while let Some(Token::Word(word)) = self.peek() {
            if !word.starts_with('.') {
                break;
            }
            self.at += 1;
            for part in word[1..].split('.') {
                match part {
                    "global" => space = Some(Space::Global),
                    "shared" => space = Some(Space::Shared),
                    "local" => space = Some(Space::Local),
                    "const" => space = Some(Space::Const),
                    "param" => space = Some(Space::Param),
                    "align" => align = Some(self.integer()? as usize),
                    "v2" => lanes = 2,
                    "v4" => lanes = 4,
                    // attributes of pointers among parameters
                    "ptr" => {
                        while matches!(
                            self.peek(),
                            Some(Token::Word(".global" | ".shared" | ".const" | ".local"))
                        ) {
                            self.at += 1;
                        }
                    }
                    _ => {
                        kind = Some(
                            Type::named(part)
                                .ok_or_else(|| self.error(format!("unknown directive .{part}")))?,
                        )
                    }
                }
            }
        }
        let (Some(space), Some(kind)) = (space, kind) else {
            return Err(self.error("expected a variable's state space and type"));
        };
        let size = kind.width() as usize / 8;
        let name = self.word()?.to_owned();
        let mut bytes = size * lanes;
        while self.take('[') {
            if self.take(']') {
                bytes = 0;
            } else {
                bytes = bytes.saturating_mul(self.integer()? as usize);
                self.expect(']')?;
            }
        }
        let mut init = Vec::new();
        if self.take('=') {
            self.initialiser(kind, &mut init)?;
            bytes = bytes.max(init.len());
        }
        let align = align.unwrap_or(size * lanes).max(1);
        if !align.is_power_of_two() || bytes > 1 << 32 {
            return Err(self.error("a variable's alignment or size is not possible"));
        }
        Ok(vec![Variable {
            name,
            space,
            align,
            bytes,
            init,
            line,
        }])
    }

    fn initialiser(&mut self, kind: Type, out: &mut Vec<u8>) -> Result<(), Error> {
        if self.take('{') {
            while !self.take('}') {
                self.initialiser(kind, out)?;
                self.take(',');
            }
            return Ok(());
        }
        let size = kind.width() as usize / 8;
        let minus = self.take('-');
        let word = self.word()?;
        let literal = literal(word)
            .ok_or_else(|| self.error(format!("an initialiser that is no number: {word}")))?;
        let bits = if minus { literal.negated() } else { literal }.bits(kind);
        out.extend_from_slice(&bits.to_le_bytes()[..size]);
        Ok(())
    }

    fn body(&mut self) -> Result<Vec<Statement>, Error> {
        let (mut out, mut depth) = (Vec::new(), 0);
        loop {
            if self.take('{') {
                depth += 1;
                out.push(Statement::Open);
                continue;
            }
            if self.take('}') {
                if depth == 0 {
                    return Ok(out);
                }
                depth -= 1;
                out.push(Statement::Close);
                continue;
            }
            if self.take(';') {
                continue;
            }
            self.statement(&mut out)?;
        }
    }

    fn statement(&mut self, out: &mut Vec<Statement>) -> Result<(), Error> {
        match (self.peek(), self.tokens.get(self.at + 1).map(|t| t.token)) {
            (Some(Token::Word(label)), Some(Token::Sign(':'))) => {
                self.at += 2;
                match self.peek() {
                    Some(Token::Word(".branchtargets")) => {
                        self.at += 1;
                        let mut targets = vec![self.word()?.to_owned()];
                        while self.take(',') {
                            targets.push(self.word()?.to_owned());
                        }
                        self.expect(';')?;
                        out.push(Statement::Targets(label.to_owned(), targets));
                    }
                    Some(Token::Word(".callprototype" | ".calltargets")) => {
                        return Err(self.error("indirect calls are not interpreted"));
                    }
                    _ => out.push(Statement::Label(label.to_owned())),
                }
            }
            (Some(Token::Word(".loc" | ".file")), _) => self.skip_line(),
            (Some(Token::Word(".pragma")), _) => while self.next()? != Token::Sign(';') {},
            (Some(Token::Word(word)), _) if word == ".reg" || word.starts_with(".reg.") => {
                self.registers(out)?
            }
            (Some(Token::Word(word)), _) if word.starts_with('.') => {
                out.extend(self.variables()?.into_iter().map(Statement::Variable));
                self.expect(';')?;
            }
            _ => out.push(Statement::Instruction(self.instruction()?)),
        }
        Ok(())
    }

    fn registers(&mut self, out: &mut Vec<Statement>) -> Result<(), Error> {
        let mut kind = None;
        while let Some(Token::Word(word)) = self.peek() {
            if !word.starts_with('.') {
                break;
            }
            self.at += 1;
            for part in word[1..].split('.').filter(|p| *p != "reg") {
                kind = Some(Type::named(part).ok_or_else(|| {
                    self.error(format!("registers of type .{part} are not interpreted"))
                })?);
            }
        }
        let kind = kind.ok_or_else(|| self.error("a register without a type"))?;
        loop {
            let name = self.word()?.to_owned();
            let mut count = None;
            if self.take('<') {
                count = Some(
                    u32::try_from(self.integer()?).map_err(|_| self.error("too many registers"))?,
                );
                self.expect('>')?;
            }
            out.push(Statement::Register { name, count, kind });
            if !self.take(',') {
                return self.expect(';');
            }
        }
    }

    fn instruction(&mut self) -> Result<Instruction, Error> {
        let first = self.at;
        let line = self.line();
        let mut guard = None;
        if self.take('@') {
            let negated = self.take('!');
            guard = Some((self.word()?.to_owned(), negated));
        }
        let mut operation = self.word()?.to_owned();
        // some modifiers have parts: `.L2::128B`
        while self.take(':') {
            self.expect(':')?;
            operation = format!("{operation}::{}", self.word()?);
        }
        let parts: Vec<String> = operation.split('.').map(str::to_owned).collect();
        let mut operands = Vec::new();
        while !self.take(';') {
            operands.push(self.operand()?);
            if !self.take(',') && self.peek() != Some(Token::Sign(';')) {
                // a call's groups may stand without commas
                if !matches!(operands.last(), Some(Operand::Group(_))) {
                    return Err(self.error("expected ',' or ';'"));
                }
            }
        }
        let text = &self.source[self.tokens[first].start..self.tokens[self.at - 1].end];
        let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
        Ok(Instruction {
            line,
            text: text.into(),
            guard,
            parts,
            operands,
        })
    }

    fn operand(&mut self) -> Result<Operand, Error> {
        let operand = match self.next()? {
            Token::Sign('!') => Operand::Not(Box::new(self.operand()?)),
            Token::Sign('-') => {
                let word = self.word()?;
                let value =
                    literal(word).ok_or_else(|| self.error("expected a number behind '-'"))?;
                Operand::Literal(value.negated())
            }
            Token::Sign('{') => Operand::Vector(self.list('}')?),
            Token::Sign('(') => Operand::Group(self.list(')')?),
            Token::Sign('[') => self.address()?,
            Token::Word(word) => match literal(word) {
                Some(value) => Operand::Literal(value),
                None if self.take('+') => Operand::Offset(word.to_owned(), self.integer()?),
                None => Operand::Name(word.to_owned()),
            },
            _ => return Err(self.error("expected an operand")),
        };
        if self.take('|') {
            return Ok(Operand::Pair(Box::new(operand), Box::new(self.operand()?)));
        }
        Ok(operand)
    }

    fn list(&mut self, end: char) -> Result<Vec<Operand>, Error> {
        let mut out = Vec::new();
        while !self.take(end) {
            out.push(self.operand()?);
            self.take(',');
        }
        Ok(out)
    }

    fn address(&mut self) -> Result<Operand, Error> {
        let word = self.word()?;
        let base = match literal(word) {
            Some(Literal::Integer(value)) => {
                self.expect(']')?;
                return Ok(Operand::Address(None, value as i64));
            }
            Some(_) => return Err(self.error("an address that is a fraction")),
            None => word.to_owned(),
        };
        let mut offset = 0;
        if self.take('+') || self.peek() == Some(Token::Sign('-')) {
            offset = self.integer()?;
        }
        self.expect(']')?;
        Ok(Operand::Address(Some(base), offset))
    }
}

/// The number that a word is, if it is one.
fn literal(word: &str) -> Option<Literal> {
    if !word.starts_with(|c: char| c.is_ascii_digit()) {
        return (word == "WARP_SZ").then_some(Literal::Integer(32));
    }
    let lower = word.to_ascii_lowercase();
    if let Some(digits) = lower.strip_prefix("0f").filter(|d| d.len() == 8) {
        return u32::from_str_radix(digits, 16).ok().map(Literal::Single);
    }
    if let Some(digits) = lower.strip_prefix("0d").filter(|d| d.len() == 16) {
        return u64::from_str_radix(digits, 16).ok().map(Literal::Double);
    }
    let digits = lower.strip_suffix('u').unwrap_or(&lower);
    let integer = if let Some(hex) = digits.strip_prefix("0x") {
        u64::from_str_radix(hex, 16).ok()
    } else if let Some(binary) = digits.strip_prefix("0b") {
        u64::from_str_radix(binary, 2).ok()
    } else if digits.len() > 1
        && digits.starts_with('0')
        && digits.bytes().all(|b| b.is_ascii_digit())
    {
        u64::from_str_radix(digits, 8).ok()
    } else {
        digits.parse().ok()
    };
    integer.map(Literal::Integer).or_else(|| {
        lower
            .parse::<f64>()
            .ok()
            .map(|v| Literal::Double(v.to_bits()))
    })
}
