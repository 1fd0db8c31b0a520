//! Adapters meet a model: each module of a file finds the weights that it changes, shapes are compared, and what fits nothing is told.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::about::made_for;
use super::bound::{Bound, Fit, Mode, Patch, Worn, is_per_input, whole};
use super::delta::DoraNorm;
use super::file::{Adapter, Module};
use super::form::Extent;
use super::keys::{Owner, TEXT_2, TEXT_3, flat, owners};
use super::names::{Names, Target};
use super::strength::{Curve, Strength};
use crate::checkpoint::printable;
use crate::error::{Error, Result};

/// How many adapters there may be at once.
pub const MOST: usize = 64;
/// The largest strength, of either sign: no picture survives a fraction of it.
const MOST_STRENGTH: f64 = 100.0;

/// An adapter and how much of it.
#[derive(Debug, Clone)]
struct Wanted {
    adapter: Arc<Adapter>,
    strength: Strength,
}

/// The adapters that a model wears, in the order in which they are put on.
#[derive(Debug, Clone, Default)]
pub struct Adapters {
    list: Vec<Wanted>,
    norm: DoraNorm,
    strict: bool,
    mode: Mode,
}

/// A network that adapters may change: its tensors by canonical names, with their shapes.
#[derive(Debug, Clone)]
pub struct Network {
    /// Which one.
    pub owner: Owner,
    /// Names and shapes.
    pub tensors: BTreeMap<String, Vec<usize>>,
    /// Those among them that the file keeps in less room than 16-bit numbers take.
    pub compressed: BTreeSet<String>,
}

impl Adapters {
    /// Puts an adapter on, at these strengths in the text towers and in the denoising network. The same file twice is one with both strengths.
    ///
    /// # Errors
    /// [`Error::Usage`] when there are more than [`MOST`], or a strength is beyond 100 of either sign.
    pub fn add(&mut self, adapter: &Arc<Adapter>, text: f64, denoiser: f64) -> Result<()> {
        self.wear(adapter, Strength::constant(text, denoiser))
    }

    /// The same with strengths that may change, and may be different from block to block.
    ///
    /// # Errors
    /// As [`Adapters::add`].
    pub fn wear(&mut self, adapter: &Arc<Adapter>, strength: Strength) -> Result<()> {
        let check = |curve: &Curve| {
            let most = curve.largest();
            if most <= MOST_STRENGTH {
                return Ok(());
            }
            Err(Error::Usage(format!(
                "the LoRA {} has a weight of {curve}, expected -{MOST_STRENGTH} to {MOST_STRENGTH}; 1 is as it was trained",
                adapter.path().display()
            )))
        };
        let both = |strength: &Strength| check(&strength.text).and(check(&strength.denoiser));
        let real = |path: &std::path::Path| std::fs::canonicalize(path).ok();
        let path = real(adapter.path());
        let same = self.list.iter_mut().find(|other| {
            other.adapter.path() == adapter.path()
                || (path.is_some() && real(other.adapter.path()) == path)
        });
        let same = same.and_then(|other| Some((other.strength.as_constant()?, other)));
        if let (Some(((text, denoiser), other)), Some((more_text, more_denoiser))) =
            (same, strength.as_constant())
        {
            let sum = Strength::constant(text + more_text, denoiser + more_denoiser);
            both(&sum)?;
            other.strength = sum;
            return Ok(());
        }
        both(&strength)?;
        if self.list.len() >= MOST {
            return Err(Error::Usage(format!(
                "there are more than {MOST} LoRAs; merge some of them"
            )));
        }
        self.list.push(Wanted {
            adapter: Arc::clone(adapter),
            strength,
        });
        Ok(())
    }

    /// The adapters, in the order in which they are put on.
    pub fn iter(&self) -> impl Iterator<Item = &Adapter> {
        self.list.iter().map(|wanted| wanted.adapter.as_ref())
    }

    /// Whether anything in an adapter that has no place in the model is an error.
    pub fn set_strict(&mut self, strict: bool) {
        self.strict = strict;
    }

    /// How the denoising network wears them.
    pub fn set_mode(&mut self, mode: Mode) {
        self.mode = mode;
    }

    /// Which lengths DoRA divides by.
    pub fn set_dora_norm(&mut self, norm: DoraNorm) {
        self.norm = norm;
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// Finds what the adapters change in these networks of a model, which is `title` in words: "a Stable Diffusion 1 checkpoint".
    ///
    /// # Errors
    /// [`Error::BadModel`] when an adapter fits nothing in the model, or something of it has another shape there.
    pub fn bind(&self, networks: &[Network], title: &str) -> Result<Bound> {
        let mut bound = Bound {
            norm: self.norm,
            ..Bound::default()
        };
        let known: Vec<Known<'_>> = networks.iter().map(Known::new).collect();
        for wanted in &self.list {
            let mut match_ = Match {
                known: &known,
                wanted,
                place: bound.worn.len(),
                title,
                patches: Vec::new(),
                modules: 0,
                unmatched: Vec::new(),
            };
            match_.run()?;
            if let Some(warning) = match_.warning() {
                if self.strict {
                    return Err(match_.refuse_strictly());
                }
                bound.warnings.push(warning);
            }
            bound
                .worn
                .push(Worn::new(match_.fit(), wanted.strength.clone()));
            for (owner, name, patch) in match_.patches {
                let network = bound.patches.entry(owner).or_default();
                network.entry(name).or_default().push(patch);
            }
        }
        bound.beside = self.beside(&bound, networks);
        Ok(bound)
    }

    /// The tensors whose changes are computed beside them: all that change one have to be products.
    fn beside(&self, bound: &Bound, networks: &[Network]) -> BTreeMap<Owner, BTreeSet<String>> {
        let denoisers = networks.iter().filter(|n| n.owner == Owner::Denoiser);
        let of = |network: &Network| {
            let is_beside = |name: &str, patches: &[Patch]| {
                let must = || {
                    network.compressed.contains(name)
                        || patches.iter().any(|patch| self.changes_over_steps(patch))
                };
                match self.mode {
                    Mode::Merge => false,
                    Mode::Auto => must(),
                    Mode::Runtime => {
                        let shape = network.tensors.get(name);
                        must() || shape.is_some_and(|shape| is_thin(patches, shape))
                    }
                }
            };
            let patches = bound.patches.get(&network.owner).into_iter().flatten();
            let names = patches
                .filter(|(name, patches)| {
                    // a table's rows are read by no layer
                    *name != TABLE
                        && patches.iter().all(Patch::is_product)
                        && is_beside(name, patches)
                })
                .map(|(name, _)| name.clone());
            (network.owner, names.collect())
        };
        denoisers.map(of).collect()
    }

    fn changes_over_steps(&self, patch: &Patch) -> bool {
        let wanted = self.list.get(patch.worn);
        wanted.is_some_and(|wanted| wanted.strength.changes_over_steps())
    }
}

/// What layers beside a layer may cost, as a part of its own multiplications: about a third of a step's are in layers that LoRAs change, and thin
/// products run at some two thirds of the others' speed.
const THIN: f64 = 0.05;

/// Whether layers beside one with this weight, `[outputs, inputs, ..]`, would cost little.
fn is_thin(patches: &[Patch], shape: &[usize]) -> bool {
    let (outputs, all) = (shape.first().copied(), shape.iter().product::<usize>());
    let outputs = outputs.unwrap_or(1).max(1);
    let ranks = patches.iter().filter_map(|patch| {
        let (_, down) = patch.module()?.factors()?;
        Some(down.rows() as f64)
    });
    ranks.sum::<f64>() * (outputs + all / outputs) as f64 <= THIN * all as f64
}

/// The classes of a denoising network that has some.
const TABLE: &str = "class_embedding.weight";

/// A network and its names.
struct Known<'a> {
    network: &'a Network,
    names: Names,
}

impl<'a> Known<'a> {
    fn new(network: &'a Network) -> Self {
        let tensors = network.tensors.keys().map(String::as_str);
        Self {
            names: Names::of(network.owner, tensors),
            network,
        }
    }

    fn is_t5(&self) -> bool {
        self.network.tensors.contains_key("shared.weight")
    }
}

/// One adapter while its modules look for their weights.
struct Match<'a> {
    known: &'a [Known<'a>],
    wanted: &'a Wanted,
    /// Its place among all that are worn.
    place: usize,
    title: &'a str,
    patches: Vec<(Owner, String, Patch)>,
    /// Modules that were found.
    modules: usize,
    unmatched: Vec<String>,
}

impl Match<'_> {
    fn run(&mut self) -> Result<()> {
        let adapter = Arc::clone(&self.wanted.adapter);
        let mut misfit = None;
        for (index, module) in adapter.modules.iter().enumerate() {
            let flat = flat(&module.name);
            let mut places = self.places(&flat).into_iter();
            let mut outcome = None;
            // where the name does not tell the network, shapes do
            for (owner, targets) in places.by_ref() {
                let fits = targets.iter().try_fold(Vec::new(), |mut patches, target| {
                    patches.extend(self.patches_of((index, module), owner, target)?);
                    Ok::<_, String>(patches)
                });
                outcome = Some(fits);
                if matches!(outcome, Some(Ok(_))) {
                    break;
                }
            }
            match outcome {
                None => self.unmatched.push(module.name.clone()),
                Some(Err(reason)) => misfit = misfit.or(Some((module, reason))),
                Some(Ok(patches)) => {
                    self.modules += 1;
                    self.patches.extend(patches);
                }
            }
        }
        match misfit {
            Some((module, reason)) => {
                Err(self.refuse(&format!("module `{}` {reason}", printable(&module.name))))
            }
            None if self.modules == 0 => Err(self.refuse(&format!(
                "none of its {} modules, such as `{}`, is in the model",
                adapter.modules.len(),
                adapter
                    .modules
                    .first()
                    .map_or_else(String::new, |m| printable(&m.name)),
            ))),
            None => Ok(()),
        }
    }

    /// The networks that know a name, and what it means there.
    fn places(&self, flat: &str) -> Vec<(Owner, Vec<Target>)> {
        let mut places = Vec::new();
        for (owner, rest) in owners(flat) {
            let there = |owner| self.known.iter().any(|known| known.network.owner == owner);
            // T5 is FLUX's second text tower, and some call it the third all the same
            let owner = match owner {
                Some(TEXT_3) if !there(TEXT_3) => Some(TEXT_2),
                owner => owner,
            };
            let known = self
                .known
                .iter()
                .filter(|known| owner.is_none_or(|owner| owner == known.network.owner));
            for known in known {
                let owner = known.network.owner;
                let found = known.names.find(owner, rest);
                places.extend(found.map(|targets| (owner, targets.to_vec())));
            }
            if !places.is_empty() {
                break;
            }
        }
        places
    }

    /// What a module changes in a target: its weight, its bias. An error says why its shape does not fit.
    fn patches_of(
        &self,
        (index, module): (usize, &Module),
        owner: Owner,
        target: &Target,
    ) -> std::result::Result<Vec<(Owner, String, Patch)>, String> {
        let known = self.known.iter().find(|k| k.network.owner == owner);
        let shape = |end: &str| {
            let name = format!("{}.{end}", target.module);
            let shape = known?.network.tensors.get(&name)?.clone();
            Some((name, shape))
        };
        let patch = |bias| Patch {
            adapter: Arc::clone(&self.wanted.adapter),
            module: index,
            worn: self.place,
            factor: self.factor(owner, known, &target.module),
            rows: target.rows,
            swapped: target.swapped,
            bias,
        };
        let mut patches = Vec::new();
        if module.form.is_some() {
            let (name, shape) = shape("weight").ok_or("has no weight in the model")?;
            check(module, &shape, target)?;
            patches.push((owner, name, patch(false)));
        }
        if let Some((bias, _)) = &module.bias {
            let (name, shape) =
                shape("bias").ok_or("changes a bias, and the module has none in the model")?;
            let wanted = whole(Extent::of(&shape), target.rows).rows;
            if bias.elements() != wanted {
                return Err(format!(
                    "changes a bias by {} numbers, and it has {wanted}",
                    bias.elements()
                ));
            }
            patches.push((owner, name, patch(true)));
        }
        Ok(patches)
    }

    /// The weight of the block that a module lies in.
    fn factor(&self, owner: Owner, known: Option<&Known<'_>>, module: &str) -> f32 {
        let Some(blocks) = &self.wanted.strength.blocks else {
            return 1.0;
        };
        match owner {
            Owner::Denoiser => blocks.of(known.and_then(|known| known.names.block(module))),
            Owner::Text(_) => blocks.of_text(known.is_some_and(Known::is_t5)),
        }
    }

    /// What the adapter and the model are, and why the one does not go with the other.
    fn refuse(&self, reason: &str) -> Error {
        let adapter = &self.wanted.adapter;
        let made = match made_for(adapter) {
            Some((family, evidence)) => {
                format!(
                    "this LoRA was made for {family} ({evidence}), and the model is {}",
                    self.title
                )
            }
            None => format!("this LoRA does not fit the model, which is {}", self.title),
        };
        Error::bad_model(
            adapter.path(),
            format!("{made}: {reason}; give a LoRA that was made for such a model"),
        )
    }

    /// The names in the file that have no place in the model, fit to be printed.
    fn left(&self) -> Vec<String> {
        let strange = self.wanted.adapter.strange.iter();
        let all = self.unmatched.iter().chain(strange);
        all.map(|name| printable(name)).collect()
    }

    fn fit(&self) -> Fit {
        let tensors: BTreeSet<_> = self
            .patches
            .iter()
            .map(|(owner, name, _)| (owner, name))
            .collect();
        Fit {
            file: printable(&self.wanted.adapter.path().display().to_string()),
            modules: self.wanted.adapter.modules.len(),
            used: self.modules,
            tensors: tensors.len(),
            unmatched: self.left(),
        }
    }

    /// What was not used: how many names, and the first of them.
    fn left_in_words(&self) -> Option<String> {
        /// Names that one sentence holds.
        const NAMED: usize = 3;
        let left = self.left();
        let named: Vec<String> = left
            .iter()
            .take(NAMED)
            .map(|name| format!("`{name}`"))
            .collect();
        let more = match left.len().saturating_sub(NAMED) {
            0 => String::new(),
            n => format!(" and {n} more"),
        };
        (!left.is_empty()).then(|| {
            format!(
                "{} of its {} modules are used; there is no place in the model for {}{more}",
                self.modules,
                self.wanted.adapter.modules.len(),
                named.join(", ")
            )
        })
    }

    /// One sentence about what was not used.
    fn warning(&self) -> Option<String> {
        let path = self.wanted.adapter.path().display();
        Some(format!("{path}: {}", self.left_in_words()?))
    }

    /// The same as an error.
    fn refuse_strictly(&self) -> Error {
        let left = self.left_in_words().unwrap_or_default();
        Error::bad_model(
            self.wanted.adapter.path(),
            format!("{left}; leave out --strict to use it all the same"),
        )
    }
}

/// Whether a module's change is one of a weight of this shape, which is these rows of what it was made for; an error says why not.
fn check(module: &Module, shape: &[usize], target: &Target) -> std::result::Result<(), String> {
    let rows = target.rows;
    let Some(form) = &module.form else {
        return Ok(());
    };
    let extent = whole(Extent::of(shape), rows);
    if !form.fits(extent) {
        return Err(format!(
            "({}) has the shapes {}, and the weight that it changes is {shape:?}",
            form.name(),
            form.shapes()
        ));
    }
    let is_part = rows.is_some() || target.swapped;
    if is_part && (form.needs_base() || module.magnitude.is_some()) {
        return Err(format!(
            "({}) changes what are several weights here together by what they are, which is not supported",
            form.name()
        ));
    }
    let Some(magnitude) = &module.magnitude else {
        return Ok(());
    };
    let per_input = is_per_input(magnitude, extent);
    let wanted = if per_input {
        extent.inputs
    } else {
        extent.rows
    };
    if magnitude.elements() == wanted {
        return Ok(());
    }
    Err(format!(
        "has a dora_scale of the shape {:?}, and the weight that it changes is {shape:?}",
        magnitude.shape
    ))
}
