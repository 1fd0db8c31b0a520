//! A text, decoded.

use std::collections::HashMap;

use crate::Error;
use crate::lower::{Code, lower};
use crate::memory::{Allocation, CONSTS, GLOBALS, WINDOW};
use crate::parse::parse;
use crate::syntax::{Function, Space};

/// A parameter of a kernel. It lies where the C ABI puts a member of a struct of all parameters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Param {
    /// Bytes.
    pub size: usize,
    /// Alignment in bytes.
    pub align: usize,
    /// Bytes in front of it.
    pub offset: usize,
}

/// A kernel.
pub struct Kernel {
    name: String,
    params: Vec<Param>,
    max_threads: Option<u32>,
    pub(crate) code: Code,
}

impl Kernel {
    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its parameters.
    #[must_use]
    pub fn params(&self) -> &[Param] {
        &self.params
    }

    /// Bytes of all parameters, from the first to the end of the last.
    #[must_use]
    pub fn param_bytes(&self) -> usize {
        self.params.last().map_or(0, |p| p.offset + p.size)
    }

    /// Bytes of shared memory besides the dynamic array.
    #[must_use]
    pub fn static_shared(&self) -> usize {
        self.code.shared
    }

    /// The most threads of a block, where the text tells (`.maxntid`).
    #[must_use]
    pub fn max_threads(&self) -> Option<u32> {
        self.max_threads
    }
}

/// A text's kernels and variables.
pub struct Module {
    kernels: Vec<Kernel>,
    pub(crate) globals: Vec<Allocation>,
    pub(crate) consts: Vec<Allocation>,
}

impl Module {
    /// Reads and decodes a text.
    ///
    /// # Errors
    /// With line and text where it is no PTX, or PTX that is not interpreted.
    pub fn parse(text: &str) -> Result<Self, Error> {
        let text = parse(text)?;
        let (mut globals, mut consts, mut addresses) = (Vec::new(), Vec::new(), HashMap::new());
        for variable in &text.variables {
            let (list, first) = match variable.space {
                Space::Global => (&mut globals, GLOBALS),
                Space::Const => (&mut consts, CONSTS),
                _ => continue,
            };
            let allocation = Allocation::new(variable.bytes);
            // what has no initialiser is zero
            let mut bytes = vec![0; variable.bytes];
            bytes[..variable.init.len()].copy_from_slice(&variable.init);
            allocation.write(0, &bytes);
            addresses.insert(
                variable.name.clone(),
                (variable.space, (first + list.len() as u64) << WINDOW),
            );
            list.push(allocation);
        }
        let mut kernels = Vec::new();
        for function in text
            .functions
            .iter()
            .filter(|f| f.entry && f.body.is_some())
        {
            let params = layout(function);
            let offsets: Vec<usize> = params.iter().map(|p| p.offset).collect();
            let code = lower(&text, &addresses, function, &offsets)?;
            kernels.push(Kernel {
                name: function.name.clone(),
                params,
                max_threads: function.max_threads,
                code,
            });
        }
        Ok(Self {
            kernels,
            globals,
            consts,
        })
    }

    /// The kernel of a name.
    #[must_use]
    pub fn kernel(&self, name: &str) -> Option<&Kernel> {
        self.kernels.iter().find(|k| k.name == name)
    }

    /// All kernels, in the order of the text.
    pub fn kernels(&self) -> impl Iterator<Item = &Kernel> {
        self.kernels.iter()
    }
}

fn layout(function: &Function) -> Vec<Param> {
    let mut end = 0_usize;
    let place = |v: &crate::syntax::Variable| {
        let offset = end.next_multiple_of(v.align);
        end = offset + v.bytes;
        Param {
            size: v.bytes,
            align: v.align,
            offset,
        }
    };
    function.params.iter().map(place).collect()
}
