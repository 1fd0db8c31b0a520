//! The forms that a change of a weight comes in: which tensors make it, which shapes fit a weight, and the rank that its scale is counted by.

use std::collections::BTreeMap;

use super::keys::Role;

/// A tensor of an adapter's file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Stored {
    pub(super) name: String,
    pub(super) shape: Vec<usize>,
}

impl Stored {
    /// Its first axis.
    pub(super) fn rows(&self) -> usize {
        self.shape.first().copied().unwrap_or(1)
    }

    /// All other axes together.
    pub(super) fn columns(&self) -> usize {
        self.shape.iter().skip(1).product()
    }

    pub(super) fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// All axes behind the second together.
    fn taps(&self) -> usize {
        self.shape.iter().skip(2).product()
    }
}

/// A weight as adapters see it: `[rows, inputs, taps]`, taps being the positions of a convolution's kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Extent {
    pub(super) rows: usize,
    pub(super) inputs: usize,
    pub(super) taps: usize,
}

impl Extent {
    /// Of a weight of this shape; a vector has one input.
    pub(super) fn of(shape: &[usize]) -> Self {
        Self {
            rows: shape.first().copied().unwrap_or(1),
            inputs: shape.get(1).copied().unwrap_or(1),
            taps: shape.iter().skip(2).product(),
        }
    }

    pub(super) fn columns(self) -> usize {
        self.inputs.saturating_mul(self.taps)
    }

    pub(super) fn elements(self) -> usize {
        self.rows.saturating_mul(self.columns())
    }
}

/// A factor of a Kronecker product.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Factor {
    Whole(Stored),
    Product(Stored, Stored, Option<Stored>),
}

/// How a change is made of tensors. Papers: LoRA arXiv 2106.09685; LoHa 2108.06098 (FedPara); LoKr 2309.14859 (LyCORIS); GLoRA 2306.07967;
/// OFT 2306.07280; IA³ 2205.05638.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Form {
    /// up · down, for convolutions with a kernel between them (CP decomposition).
    LowRank {
        up: Stored,
        down: Stored,
        mid: Option<Stored>,
    },
    /// (a₁ · b₁) ∘ (a₂ · b₂), each a Tucker product where there are cores.
    Hadamard {
        first: (Stored, Stored),
        second: (Stored, Stored),
        cores: Option<(Stored, Stored)>,
    },
    /// first ⊗ second.
    Kronecker { first: Factor, second: Factor },
    /// W · a + b.
    Generalised {
        a: (Stored, Stored),
        b: (Stored, Stored),
        mid: Option<Stored>,
    },
    /// The difference itself.
    Full(Stored),
    /// Blocks of rows turned by orthogonal matrices (Cayley), then each row scaled.
    Rotation {
        blocks: Stored,
        rescale: Option<Stored>,
    },
    /// Inputs or outputs scaled.
    Scaling { weight: Stored, on_input: bool },
}

/// The tensors of one module by role.
pub(super) type Parts = BTreeMap<Role, Stored>;

/// A part that a form cannot do without; `end` is how its name ends.
fn need(parts: &Parts, role: Role, end: &str) -> Result<Stored, String> {
    let found = parts.get(&role).cloned();
    found.ok_or_else(|| format!("its `{end}` is missing"))
}

/// A factor of a Kronecker product, whole or as a product.
fn factor(
    parts: &Parts,
    [whole, a, b]: [(Role, &str); 3],
    core: Option<Role>,
) -> Result<Factor, String> {
    if let Some(whole) = parts.get(&whole.0) {
        return Ok(Factor::Whole(whole.clone()));
    }
    Ok(Factor::Product(
        need(parts, a.0, a.1)?,
        need(parts, b.0, b.1)?,
        core.and_then(|core| parts.get(&core).cloned()),
    ))
}

impl Form {
    /// Makes a form of a module's tensors; none where they only change a bias.
    ///
    /// # Errors
    /// A sentence's part that says what is missing or not built.
    pub(super) fn of(parts: &Parts, on_input: bool) -> Result<Option<Self>, String> {
        let has = |roles: &[Role]| roles.iter().any(|role| parts.contains_key(role));
        let get = |role, end| need(parts, role, end);
        let optional = |role: Role| parts.get(&role).cloned();
        Ok(Some(if has(&[Role::Up, Role::Down]) {
            Self::LowRank {
                up: get(Role::Up, "lora_up")?,
                down: get(Role::Down, "lora_down")?,
                mid: optional(Role::Mid),
            }
        } else if has(&[Role::HadaW1A, Role::HadaW2A]) {
            Self::hadamard(parts)?
        } else if has(&[Role::LokrW1, Role::LokrW1A, Role::LokrW2, Role::LokrW2A]) {
            let first = [
                (Role::LokrW1, "lokr_w1"),
                (Role::LokrW1A, "lokr_w1_a"),
                (Role::LokrW1B, "lokr_w1_b"),
            ];
            let second = [
                (Role::LokrW2, "lokr_w2"),
                (Role::LokrW2A, "lokr_w2_a"),
                (Role::LokrW2B, "lokr_w2_b"),
            ];
            Self::Kronecker {
                first: factor(parts, first, None)?,
                second: factor(parts, second, Some(Role::LokrT2))?,
            }
        } else if has(&[Role::GloraA1, Role::GloraB1]) {
            let pair = |one, two| Ok::<_, String>((one?, two?));
            Self::Generalised {
                a: pair(
                    get(Role::GloraA1, "a1.weight"),
                    get(Role::GloraA2, "a2.weight"),
                )?,
                b: pair(
                    get(Role::GloraB1, "b1.weight"),
                    get(Role::GloraB2, "b2.weight"),
                )?,
                mid: optional(Role::GloraBm),
            }
        } else if let Some(difference) = optional(Role::Diff) {
            Self::Full(difference)
        } else if has(&[Role::OftBlocks, Role::OftDiagonal]) {
            Self::rotation(parts)?
        } else if has(&[Role::Ia3OnInput]) {
            Self::Scaling {
                weight: get(Role::Ia3Weight, "weight")?,
                on_input,
            }
        } else if has(&[Role::DiffBias]) {
            return Ok(None);
        } else {
            return Err("it has an alpha or a scale and nothing that these would scale".to_owned());
        }))
    }

    fn hadamard(parts: &Parts) -> Result<Self, String> {
        let get = |role, end| need(parts, role, end);
        let cores = match parts.contains_key(&Role::HadaT1) || parts.contains_key(&Role::HadaT2) {
            true => Some((get(Role::HadaT1, "hada_t1")?, get(Role::HadaT2, "hada_t2")?)),
            false => None,
        };
        Ok(Self::Hadamard {
            first: (
                get(Role::HadaW1A, "hada_w1_a")?,
                get(Role::HadaW1B, "hada_w1_b")?,
            ),
            second: (
                get(Role::HadaW2A, "hada_w2_a")?,
                get(Role::HadaW2B, "hada_w2_b")?,
            ),
            cores,
        })
    }

    fn rotation(parts: &Parts) -> Result<Self, String> {
        match parts.get(&Role::OftBlocks) {
            Some(blocks) if blocks.shape.len() == 3 => Ok(Self::Rotation {
                blocks: blocks.clone(),
                rescale: parts.get(&Role::Rescale).cloned(),
            }),
            Some(_) => Err("it is a butterfly rotation (BOFT), which is not supported".to_owned()),
            None => Err(
                "it is a diagonal rotation of an old form (oft_diag), which is not supported"
                    .to_owned(),
            ),
        }
    }

    /// The form's usual name.
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::LowRank { mid: None, .. } => "LoRA",
            Self::LowRank { mid: Some(_), .. } => "LoRA with CP decomposition",
            Self::Hadamard { .. } => "LoHa",
            Self::Kronecker { .. } => "LoKr",
            Self::Generalised { .. } => "GLoRA",
            Self::Full(_) => "full difference",
            Self::Rotation { .. } => "OFT",
            Self::Scaling { .. } => "IA3",
        }
    }

    /// What alpha is divided by; none where there is nothing to scale.
    pub(super) fn rank(&self) -> Option<usize> {
        match self {
            Self::LowRank { down, .. } => Some(down.rows()),
            Self::Hadamard { first, .. } => Some(first.1.rows()),
            Self::Kronecker { first, second } => match (first, second) {
                (_, Factor::Product(_, b, _)) | (Factor::Product(_, b, _), _) => Some(b.rows()),
                _ => None,
            },
            Self::Generalised { a, b, .. } => {
                Some(if is_old(a, b) { a.0.rows() } else { a.1.rows() })
            }
            Self::Full(_) | Self::Rotation { .. } | Self::Scaling { .. } => None,
        }
    }

    /// Whether the change depends on the weight that it changes.
    pub(super) fn needs_base(&self) -> bool {
        matches!(
            self,
            Self::Generalised { .. } | Self::Rotation { .. } | Self::Scaling { .. }
        )
    }

    /// Whether the change is one of a weight of this extent.
    pub(super) fn fits(&self, to: Extent) -> bool {
        let product = |a: &Stored, b: &Stored| {
            a.columns() == b.rows() && a.rows() == to.rows && b.columns() == to.columns()
        };
        match self {
            Self::LowRank {
                up,
                down,
                mid: None,
            } => product(up, down),
            Self::LowRank {
                up,
                down,
                mid: Some(mid),
            } => is_chain((up.rows(), up.columns()), mid, down, to),
            Self::Hadamard {
                first,
                second,
                cores: None,
            } => product(&first.0, &first.1) && product(&second.0, &second.1),
            Self::Hadamard {
                first,
                second,
                cores: Some((one, two)),
            } => {
                let fits = |(a, b): &(Stored, Stored), core| {
                    is_chain((a.columns(), a.rows()), core, b, to)
                };
                fits(first, one) && fits(second, two)
            }
            Self::Kronecker { first, second } => kronecker(first, second, to).is_some(),
            Self::Generalised { a, b, mid } => {
                let ((a1, a2), (b1, b2)) = if is_old(a, b) {
                    ((&a.1, &a.0), (&b.1, &b.0))
                } else {
                    ((&a.0, &a.1), (&b.0, &b.1))
                };
                let turned = a1.columns() == a2.rows()
                    && a1.rows() == to.inputs
                    && a2.columns() == to.inputs;
                turned
                    && match mid {
                        None => product(b1, b2),
                        Some(mid) => is_chain((b1.rows(), b1.columns()), mid, b2, to),
                    }
            }
            Self::Full(difference) => {
                difference.elements() == to.elements() && difference.rows() == to.rows
            }
            Self::Rotation { blocks, rescale } => {
                let size = blocks.shape.get(1).copied().unwrap_or(0);
                blocks.shape.get(2) == Some(&size)
                    && blocks.rows().checked_mul(size) == Some(to.rows)
                    && rescale.as_ref().is_none_or(|r| r.elements() == to.rows)
            }
            Self::Scaling { weight, on_input } => {
                weight.elements() == if *on_input { to.inputs } else { to.rows }
            }
        }
    }

    /// The shapes of all tensors, for messages.
    pub(super) fn shapes(&self) -> String {
        let mut all: Vec<&Stored> = Vec::new();
        match self {
            Self::LowRank { up, down, mid } => {
                all.extend([up, down]);
                all.extend(mid);
            }
            Self::Hadamard {
                first,
                second,
                cores,
            } => {
                all.extend([&first.0, &first.1, &second.0, &second.1]);
                all.extend(cores.iter().flat_map(|(one, two)| [one, two]));
            }
            Self::Kronecker { first, second } => {
                for factor in [first, second] {
                    match factor {
                        Factor::Whole(whole) => all.push(whole),
                        Factor::Product(a, b, core) => {
                            all.extend([a, b]);
                            all.extend(core);
                        }
                    }
                }
            }
            Self::Generalised { a, b, mid } => {
                all.extend([&a.0, &a.1, &b.0, &b.1]);
                all.extend(mid);
            }
            Self::Full(difference) => all.push(difference),
            Self::Rotation { blocks, rescale } => {
                all.push(blocks);
                all.extend(rescale);
            }
            Self::Scaling { weight, .. } => all.push(weight),
        }
        let shapes: Vec<String> = all.iter().map(|s| format!("{:?}", s.shape)).collect();
        shapes.join(", ")
    }
}

/// Whether GLoRA's tensors are those of its first release, which has them the other way round: as ComfyUI tells.
pub(super) fn is_old(a: &(Stored, Stored), b: &(Stored, Stored)) -> bool {
    let rank = a.1.rows();
    let new = b.1.rows() == rank && b.0.columns() == rank && a.0.columns() == rank;
    !new && a.0.rows() == b.0.rows() && b.1.columns() == a.0.rows()
}

/// Whether up `[rows, m]`, core `[m, n, taps]` and down `[n, inputs]` make a weight.
fn is_chain((rows, m): (usize, usize), core: &Stored, down: &Stored, to: Extent) -> bool {
    core.shape.len() >= 2
        && rows == to.rows
        && core.rows() == m
        && core.shape.get(1) == Some(&down.rows())
        && core.taps() == to.taps
        && down.columns() == to.inputs
}

/// The shapes `[rows, inputs]` of the first factor and `[rows, inputs]` (of `taps` each) of the second of a Kronecker product that makes this
/// weight.
pub(super) fn kronecker(
    first: &Factor,
    second: &Factor,
    to: Extent,
) -> Option<((usize, usize), (usize, usize))> {
    let whole = |factor: &Factor| match factor {
        Factor::Whole(stored) => Some((stored.rows(), stored.columns())),
        Factor::Product(a, b, None) => (a.columns() == b.rows()).then(|| (a.rows(), b.columns())),
        Factor::Product(a, b, Some(core)) => {
            let second = core.shape.get(1).copied();
            let fits = core.rows() == a.rows() && second == Some(b.rows());
            fits.then(|| Some((a.columns(), b.columns().checked_mul(core.taps())?)))?
        }
    };
    let ((a, c), (b, columns)) = (whole(first)?, whole(second)?);
    let taps = to.taps.max(1);
    let d = columns / taps;
    let fits = columns.is_multiple_of(taps)
        && a.checked_mul(b) == Some(to.rows)
        && c.checked_mul(d) == Some(to.inputs);
    fits.then_some(((a, c), (b, d)))
}
