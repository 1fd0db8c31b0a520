//! Upscalers: which network a file holds, and for the ESRGAN family its structure from names and shapes, and what its tensors are called.
//!
//! Three spellings of that family's network are about: the first ESRGAN's numbered layers, BSRGAN's and RealSR's words, and BasicSR's, which ours are.

use sd_models::upscaler::{CompactConfig, Config, RrdbConfig};

use super::layout::{Inner, Layout, inner};
use super::ldm_unet::Shapes;
use super::swin;

/// More blocks and layers than any has.
pub(super) const MAX_BLOCKS: usize = 512;
/// The widest layer that is taken.
pub(super) const MAX_CHANNELS: usize = 4096;

/// Where dense blocks' convolutions lie in a numbered file.
const NUMBERED: &[Inner] = &[
    inner("conv1", "conv1.0"),
    inner("conv2", "conv2.0"),
    inner("conv3", "conv3.0"),
    inner("conv4", "conv4.0"),
    inner("conv5", "conv5.0"),
];

/// What training keeps weights below: averaged ones come first.
const WRAPPERS: [&str; 8] = [
    "",
    "params_ema.",
    "params-ema.",
    "params.",
    "model_state_dict.",
    "state_dict.",
    "model.",
    "net.",
];
/// What frameworks put before all names.
const PREFIXES: [&str; 4] = ["", "module.", "netG.", "generator."];

/// A network that is known and not built, and the names that only it has.
const OTHERS: &[(&str, &[&str])] = &[
    ("GFPGAN", &["stylegan_decoder.style_mlp.1.weight"]),
    ("CodeFormer", &["quantize.embedding.weight", "position_emb"]),
    ("RestoreFormer", &["quantize.embedding.weight"]),
    ("RGT", &["layers.0.blocks.0.gamma"]),
    ("DAT", &["layers.0.blocks.0.attn.qkv.weight"]),
    ("DRCT", &["layers.0.swin1.norm1.weight"]),
    ("ATD", &["layers.0.residual_group.td"]),
    (
        "CRAFT",
        &["layers.0.residual_group.hf_blocks.0.attn.temperature"],
    ),
    ("GRL", &["norm_start.weight", "norm_end.weight"]),
    (
        "OmniSR",
        &["residual_layer.0.residual_layer.0.layer.0.fn.0.weight"],
    ),
    ("Real-CUGAN", &["unet1.conv1.conv.0.weight"]),
    ("SPAN", &["block_1.c1_r.sk.weight"]),
    ("SCUNet", &["m_head.0.weight", "m_tail.0.weight"]),
    ("PLKSR", &["feats.0.weight", "feats.1.lk.conv.weight"]),
    ("SPSR", &["b_fea_conv.0.weight", "f_block.0.weight"]),
];

/// The upscaler in a file.
pub(crate) struct Found {
    pub(crate) config: Config,
    pub(crate) layout: Layout,
    /// What its names begin with.
    prefix: String,
}

impl Found {
    /// Whether a stored name would be one of the network's, if that had such a tensor.
    pub(crate) fn covers(&self, name: &str) -> bool {
        // other copies of the weights, which are not read
        let copy = WRAPPERS[1..4]
            .iter()
            .any(|wrapper| name.starts_with(wrapper));
        let index = matches!(self.config, Config::Swin(_)) && swin::is_index(name);
        name.starts_with(&self.prefix) && (!copy || !self.prefix.is_empty()) && !index
    }
}

/// Structure and names of the upscaler in a file.
///
/// # Errors
/// A sentence that says which network it is instead, or what is missing.
pub(crate) fn read(shapes: &Shapes<'_>) -> Result<Found, String> {
    let prefixes = WRAPPERS.iter().flat_map(|wrapper| {
        let inner = PREFIXES.iter();
        inner.map(move |prefix| format!("{wrapper}{prefix}"))
    });
    for prefix in prefixes {
        let below = |name: &str| shapes(&format!("{prefix}{name}"));
        if let Some(spelling) = Spelling::find(&below) {
            let config = read_rrdb(spelling, &below)?;
            let layout = spelling.layout(&prefix, &config);
            return Ok(Found {
                config: Config::Rrdb(config),
                layout,
                prefix,
            });
        }
        if below("body.0.weight").is_some() && below("body.2.weight").is_some() {
            let config = read_compact(&below)?;
            return Ok(Found {
                config: Config::Compact(config),
                layout: Layout::identity(&prefix),
                prefix,
            });
        }
        if let Some((config, layout)) = swin::read(&prefix, &below)? {
            return Ok(Found {
                config: Config::Swin(config),
                layout,
                prefix,
            });
        }
        let other = OTHERS
            .iter()
            .find(|(_, names)| names.iter().all(|name| below(name).is_some()));
        if let Some((name, _)) = other {
            return Err(format!(
                "it is a {name} network, which is not built; use one of the ESRGAN family (ESRGAN, Real-ESRGAN, compact) or SwinIR, Swin2SR or HAT"
            ));
        }
    }
    Err("it holds no upscaler that is known: neither layers of ESRGAN (`model.1.sub.0…`, `body.0.rdb1…`), nor of a compact network (`body.0…`), nor of SwinIR and its kin (`layers.0.residual_group…`)".to_owned())
}

/// How an RRDB network's tensors are called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Spelling {
    /// `model.0`, `model.1.sub.0.RDB1.conv1.0`.
    Numbered,
    /// `conv_first`, `RRDB_trunk.0.RDB1.conv1`.
    Trunk,
    /// `conv_first`, `body.0.rdb1.conv1`.
    Body,
}

impl Spelling {
    fn find(shapes: &Shapes<'_>) -> Option<Self> {
        [Self::Numbered, Self::Trunk, Self::Body]
            .into_iter()
            .find(|spelling| shapes(&spelling.dense(0, 1, "conv1")).is_some())
    }

    /// The weight of a convolution in dense block `j` (from 1) of block `i`.
    fn dense(self, i: usize, j: usize, conv: &str) -> String {
        match self {
            Self::Numbered if conv == "conv1x1" => {
                format!("model.1.sub.{i}.RDB{j}.conv1x1.weight")
            }
            Self::Numbered => format!("model.1.sub.{i}.RDB{j}.{conv}.0.weight"),
            Self::Trunk => format!("RRDB_trunk.{i}.RDB{j}.{conv}.weight"),
            Self::Body => format!("body.{i}.rdb{j}.{conv}.weight"),
        }
    }

    /// The convolutions outside of blocks: canonical and stored.
    fn outer(self, blocks: usize, doublings: usize) -> Vec<(String, String)> {
        let own = |canonical: &str, stored: String| (canonical.to_owned(), stored);
        let mut names = match self {
            Self::Numbered => vec![
                own("conv_first", "model.0".to_owned()),
                own("conv_body", format!("model.1.sub.{blocks}")),
                // an enlargement, a convolution and an activation each
                own("conv_hr", format!("model.{}", 3 * doublings + 2)),
                own("conv_last", format!("model.{}", 3 * doublings + 4)),
            ],
            Self::Trunk => vec![
                own("conv_first", "conv_first".to_owned()),
                own("conv_body", "trunk_conv".to_owned()),
                own("conv_hr", "HRconv".to_owned()),
                own("conv_last", "conv_last".to_owned()),
            ],
            Self::Body => ["conv_first", "conv_body", "conv_hr", "conv_last"]
                .map(|name| own(name, name.to_owned()))
                .to_vec(),
        };
        names.extend((1..=doublings).map(|i| (format!("conv_up{i}"), self.doubling(i))));
        names
    }

    /// The convolution behind doubling `i`, from 1.
    fn doubling(self, i: usize) -> String {
        match self {
            Self::Numbered => format!("model.{}", 3 * i),
            Self::Trunk => format!("upconv{i}"),
            Self::Body => format!("conv_up{i}"),
        }
    }

    /// How often the size is doubled.
    fn doublings(self, shapes: &Shapes<'_>) -> usize {
        // numbered ones end in layers 3n + 2 and 3n + 4, which no doubling has
        let there = |i: &usize| shapes(&format!("{}.weight", self.doubling(*i))).is_some();
        (1..10).take_while(there).count()
    }

    fn layout(self, prefix: &str, config: &RrdbConfig) -> Layout {
        let mut layout = Layout::identity(prefix);
        let full = |name: String| format!("{prefix}{name}");
        for (canonical, stored) in self.outer(config.blocks, config.doublings) {
            layout.rename(&canonical, &full(stored), &[]);
        }
        for i in 0..config.blocks {
            for j in 1..=3 {
                let canonical = format!("body.{i}.rdb{j}");
                match self {
                    Self::Numbered => {
                        let stored = full(format!("model.1.sub.{i}.RDB{j}"));
                        layout.rename(&canonical, &stored, NUMBERED);
                    }
                    Self::Trunk => {
                        layout.rename(&canonical, &full(format!("RRDB_trunk.{i}.RDB{j}")), &[]);
                    }
                    Self::Body => layout.rename(&canonical, &full(canonical.clone()), &[]),
                }
            }
        }
        layout
    }
}

/// The first two axes of a convolution's weight: channels out and in.
pub(super) fn channels(shapes: &Shapes<'_>, name: &str) -> Result<(usize, usize), String> {
    match shapes(name).as_deref() {
        Some(&[output, input, 3, 3])
            if (1..=MAX_CHANNELS).contains(&output) && (1..=MAX_CHANNELS).contains(&input) =>
        {
            Ok((output, input))
        }
        Some(shape) => Err(format!(
            "tensor `{name}` has shape {shape:?}, expected a 3×3 convolution's of at most {MAX_CHANNELS} channels"
        )),
        None => Err(format!(
            "tensor `{name}` is missing, so the network is not whole"
        )),
    }
}

fn read_rrdb(spelling: Spelling, shapes: &Shapes<'_>) -> Result<RrdbConfig, String> {
    let blocks = (0..MAX_BLOCKS)
        .take_while(|i| shapes(&spelling.dense(*i, 1, "conv1")).is_some())
        .count();
    let doublings = spelling.doublings(shapes);
    let stored = |canonical: &str| {
        let names = spelling.outer(blocks, doublings);
        let found = names.into_iter().find(|(name, _)| name == canonical);
        found.map_or_else(String::new, |(_, stored)| format!("{stored}.weight"))
    };
    let (features, input) = channels(shapes, &stored("conv_first"))?;
    let (output, _) = channels(shapes, &stored("conv_last"))?;
    let (growth, _) = channels(shapes, &spelling.dense(0, 1, "conv1"))?;
    // Real-ESRGAN for factors 1 and 2: the channels of squares stand side by side
    let unshuffle = match input {
        _ if input == 4 * output => 2,
        _ if input == 16 * output => 4,
        _ => 1,
    };
    if unshuffle > 1 << doublings {
        return Err(format!(
            "its first convolution takes squares of {unshuffle}x{unshuffle} pixels, but it enlarges {doublings} times only, so that pictures would become smaller"
        ));
    }
    Ok(RrdbConfig {
        input: input / (unshuffle * unshuffle),
        output,
        features,
        growth,
        blocks,
        doublings,
        unshuffle,
        plus: shapes(&spelling.dense(0, 1, "conv1x1")).is_some(),
    })
}

fn read_compact(shapes: &Shapes<'_>) -> Result<CompactConfig, String> {
    let name = |layer: usize| format!("body.{layer}.weight");
    let convs = (0..MAX_BLOCKS)
        .take_while(|i| shapes(&name(2 * i)).is_some())
        .count();
    if shapes(&name(1)).is_none() {
        return Err("its convolutions are not followed by slopes (PReLU), so it is no compact network that is known".to_owned());
    }
    let (features, input) = channels(shapes, &name(0))?;
    let (pixels, _) = channels(shapes, &name(2 * convs - 2))?;
    // what goes out is most probably what comes in
    let fit = [input, 3, 4, 1].into_iter().find_map(|output| {
        let scale = (pixels / output).isqrt();
        (scale > 0 && scale * scale * output == pixels).then_some((output, scale))
    });
    match fit {
        Some((output, scale)) if output == input => Ok(CompactConfig {
            input,
            output,
            features,
            convs,
            scale,
        }),
        _ => Err(format!(
            "its last convolution has {pixels} channels, expected {input} times a square"
        )),
    }
}
