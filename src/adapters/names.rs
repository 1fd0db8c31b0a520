//! Every name that adapters have for the modules of a model, found from the model's own names: kohya's flattening is not invertible,
//! so that a table is made and looked up.
//!
//! A UNet's modules are known by diffusers' names (Stable Diffusion 1 and 2) and by CompVis' (XL), which are walked here from the blocks
//! that there are; text towers by transformers' and by OpenCLIP's, where one tensor holds three projections. Transformers have Stability's and
//! Black Forest Labs' names beside diffusers', of which the tables of `weights/` say what is fused, and FLUX those of XLabs' processors.

use std::collections::{BTreeSet, HashMap};

use super::blocks::Block;
use super::keys::Owner;
use crate::weights::layout::{Inner, Rows};
use crate::weights::ldm_unet::{DOWNSAMPLE, RESNET, TIME};
use crate::weights::text_tower::BLOCK;
use crate::weights::{flux, mmdit};

/// A module of the model that an adapter's name means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Target {
    /// Its canonical name, without `.weight`.
    pub(super) module: String,
    /// It is these rows of what the adapter was made for.
    pub(super) rows: Option<Rows>,
    /// The adapter has the second half of its rows first.
    pub(super) swapped: bool,
}

/// The modules of one network by flat names.
pub(super) struct Names {
    targets: HashMap<String, Vec<Target>>,
    /// Blocks by what the names of their modules begin with.
    blocks: Vec<(String, Block)>,
}

/// What may stand before the name of a text tower's module, in the order of trying.
const TEXT_LEADS: [&str; 5] = [
    "",
    "text_model_",
    "transformer_text_model_",
    "transformer_",
    "model_",
];

impl Names {
    /// The names of a network whose tensors are `tensors`.
    pub(super) fn of<'a>(owner: Owner, tensors: impl Iterator<Item = &'a str>) -> Self {
        let modules: BTreeSet<&str> = tensors
            .filter_map(|name| {
                name.strip_suffix(".weight")
                    .or_else(|| name.strip_suffix(".bias"))
            })
            .collect();
        let mut names = Self {
            targets: HashMap::new(),
            blocks: Vec::new(),
        };
        for module in &modules {
            names.add(module, module, None);
        }
        let has = |prefix: &str| below(&modules, prefix).next().is_some();
        match owner {
            Owner::Text(_) => names.add_open_clip(&modules),
            Owner::Denoiser if has("transformer_blocks") && has("pos_embed") => {
                names.add_stability(&modules);
            }
            Owner::Denoiser if has("transformer_blocks") || has("single_transformer_blocks") => {
                names.add_black_forest(&modules);
            }
            Owner::Denoiser => names.add_compvis(&modules),
        }
        names
    }

    /// The block that a module lies in.
    pub(super) fn block(&self, module: &str) -> Option<Block> {
        let inside = |prefix: &str| {
            let rest = module.strip_prefix(prefix);
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
        };
        let found = self.blocks.iter().find(|(prefix, _)| inside(prefix));
        found.map(|(_, block)| *block)
    }

    /// What a flat name means here.
    pub(super) fn find(&self, owner: Owner, flat: &str) -> Option<&[Target]> {
        let leads: &[&str] = match owner {
            Owner::Denoiser => &[""],
            Owner::Text(_) => &TEXT_LEADS,
        };
        let mut stripped = leads.iter().filter_map(|lead| flat.strip_prefix(lead));
        stripped.find_map(|name| self.targets.get(name).map(Vec::as_slice))
    }

    /// `name` means `module`; a name that already means another keeps that meaning.
    fn add(&mut self, name: &str, module: &str, rows: Option<Rows>) {
        let flat = name.replace('.', "_");
        // old diffusers leaves the dropout's neighbour unnumbered
        let bare = flat.strip_suffix("_to_out_0");
        let bare = bare.map(|start| format!("{start}_to_out"));
        for flat in bare.into_iter().chain([flat]) {
            let targets = self.targets.entry(flat).or_default();
            if targets.is_empty() || rows.is_some() {
                targets.push(Target {
                    module: module.to_owned(),
                    rows,
                    swapped: false,
                });
            }
        }
    }

    /// The same for a module of which the adapter has the second half first.
    fn add_swapped(&mut self, name: &str, module: &str) {
        let target = Target {
            module: module.to_owned(),
            rows: None,
            swapped: true,
        };
        self.targets
            .entry(name.replace('.', "_"))
            .or_insert_with(|| vec![target]);
    }

    /// The modules below `canonical` under the names that a table gives them below `stored`.
    fn add_table(
        &mut self,
        modules: &BTreeSet<&str>,
        (canonical, stored): (&str, &str),
        table: &[Inner],
    ) {
        for module in below(modules, canonical) {
            let rest = module.get(canonical.len()..).unwrap_or_default();
            let rest = rest.trim_start_matches('.');
            // the tables rename tensors where they are fused
            let tensor = format!("{rest}.weight");
            let found = renamed(&tensor, table).or_else(|| renamed(rest, table));
            let Some((name, rows)) = found else { continue };
            let name = name.strip_suffix(".weight").unwrap_or(&name);
            let name = format!("{stored}.{name}");
            self.add(name.trim_start_matches('.'), module, rows);
        }
    }

    /// Stability's names of Stable Diffusion 3.
    fn add_stability(&mut self, modules: &BTreeSet<&str>) {
        self.add_table(modules, ("pos_embed", ""), mmdit::PLACES);
        self.add_table(modules, ("time_text_embed", ""), mmdit::TIME_TEXT);
        self.add("final_layer.linear", "proj_out", None);
        self.add_swapped("final_layer.adaLN_modulation.1", "norm_out.linear");
        for (i, block) in numbered(modules, "transformer_blocks") {
            let stored = format!("joint_blocks.{i}");
            let last = format!("{block}.norm1_context.linear");
            if below(modules, &format!("{block}.ff_context"))
                .next()
                .is_none()
            {
                self.add_swapped(&format!("{stored}.context_block.adaLN_modulation.1"), &last);
            }
            self.add_table(modules, (&block, &stored), mmdit::SAMPLE);
        }
    }

    /// Black Forest Labs' names of FLUX, and those of XLabs' processors.
    fn add_black_forest(&mut self, modules: &BTreeSet<&str>) {
        self.add_table(modules, ("time_text_embed", ""), flux::TIME_TEXT);
        for (name, module) in [
            ("img_in", "x_embedder"),
            ("txt_in", "context_embedder"),
            ("final_layer.linear", "proj_out"),
        ] {
            self.add(name, module, None);
        }
        self.add_swapped("final_layer.adaLN_modulation.1", "norm_out.linear");
        for (name, block) in [
            ("x_embedder", Block::First),
            ("context_embedder", Block::First),
            ("time_text_embed", Block::First),
            ("norm_out", Block::Last),
            ("proj_out", Block::Last),
        ] {
            self.blocks.push((name.to_owned(), block));
        }
        let third = |index| {
            Some(Rows {
                index,
                span: 1,
                count: 3,
            })
        };
        for (i, block) in numbered(modules, "transformer_blocks") {
            let stored = format!("double_blocks.{i}");
            self.add_table(modules, (&block, &stored), flux::DOUBLE);
            for (name, fused, out) in [
                ("lora1", ["to_q", "to_k", "to_v"], "to_out.0"),
                (
                    "lora2",
                    ["add_q_proj", "add_k_proj", "add_v_proj"],
                    "to_add_out",
                ),
            ] {
                for (part, rows) in fused.iter().zip(0..) {
                    let module = format!("{block}.attn.{part}");
                    self.add(&format!("{stored}.qkv_{name}"), &module, third(rows));
                }
                let module = format!("{block}.attn.{out}");
                self.add(&format!("{stored}.proj_{name}"), &module, None);
            }
            self.blocks.push((block, Block::Double(i)));
        }
        for (i, block) in numbered(modules, "single_transformer_blocks") {
            let stored = format!("single_blocks.{i}");
            self.add_table(modules, (&block, &stored), flux::SINGLE);
            for (part, rows) in ["to_q", "to_k", "to_v"].iter().zip(0..) {
                let module = format!("{block}.attn.{part}");
                self.add(&format!("{stored}.qkv"), &module, third(rows));
            }
            self.add(
                &format!("{stored}.proj"),
                &format!("{block}.proj_out"),
                None,
            );
            self.blocks.push((block, Block::Single(i)));
        }
    }

    /// CompVis' names: two walks in the order of the blocks.
    fn add_compvis(&mut self, modules: &BTreeSet<&str>) {
        let mut walk = Walk {
            modules,
            pairs: Vec::new(),
        };
        walk.top();
        walk.down();
        walk.middle();
        walk.up();
        for (canonical, stored, inner) in walk.pairs {
            if let Some(block) = compvis_block(&stored) {
                self.blocks.push((canonical.clone(), block));
            }
            for module in below(modules, &canonical) {
                let rest = module.get(canonical.len()..).unwrap_or_default();
                let rest = rest.trim_start_matches('.');
                let rest = renamed(rest, inner).map_or(rest.to_owned(), |(name, _)| name);
                let name = format!("{stored}.{rest}");
                self.add(name.trim_end_matches('.'), module, None);
            }
        }
    }

    /// OpenCLIP's names.
    fn add_open_clip(&mut self, modules: &BTreeSet<&str>) {
        for module in modules {
            let Some(rest) = module.strip_prefix("encoder.layers.") else {
                continue;
            };
            let Some((index, rest)) = rest.split_once('.') else {
                continue;
            };
            // the table renames tensors where they are fused
            let tensor = format!("{rest}.weight");
            let Some((name, rows)) = renamed(&tensor, BLOCK).or_else(|| renamed(rest, BLOCK))
            else {
                continue;
            };
            let name = name.strip_suffix(".weight").unwrap_or(&name);
            let name = name.strip_suffix("_weight").unwrap_or(name);
            self.add(
                &format!("transformer.resblocks.{index}.{name}"),
                module,
                rows,
            );
        }
        for (module, name) in [
            ("embeddings.token_embedding", "token_embedding"),
            ("final_layer_norm", "ln_final"),
        ] {
            if modules.contains(module) {
                self.add(name, module, None);
            }
        }
    }
}

/// The stored name of `rest` by a table of renamings, and its part of a fused tensor.
fn renamed(rest: &str, inner: &[Inner]) -> Option<(String, Option<Rows>)> {
    inner.iter().find_map(|rule| {
        let tail = rest.strip_prefix(rule.canonical)?;
        let whole = tail.is_empty() || tail.starts_with('.');
        whole.then(|| (format!("{}{tail}", rule.stored), rule.rows))
    })
}

/// The block that CompVis' names say.
fn compvis_block(stored: &str) -> Option<Block> {
    let mut parts = stored.split('.');
    let kind = parts.next()?;
    let number = parts.next().and_then(|number| number.parse().ok());
    match kind {
        "input_blocks" => number.map(Block::In),
        "middle_block" => Some(Block::Middle),
        "output_blocks" => number.map(Block::Out),
        _ => None,
    }
}

/// The numbered blocks `kind.0`, `kind.1` … that there are.
fn numbered(modules: &BTreeSet<&str>, kind: &str) -> Vec<(usize, String)> {
    let blocks = (0..).map(|i| (i, format!("{kind}.{i}")));
    blocks
        .take_while(|(_, block)| below(modules, block).next().is_some())
        .collect()
}

/// The modules that are `prefix` or lie below it.
fn below<'a>(
    modules: &'a BTreeSet<&'a str>,
    prefix: &'a str,
) -> impl Iterator<Item = &'a str> + 'a {
    let all = modules.range(prefix..).copied();
    all.take_while(move |module| module.starts_with(prefix))
        .filter(move |module| {
            let rest = module.get(prefix.len()..).unwrap_or_default();
            rest.is_empty() || rest.starts_with('.')
        })
}

/// Canonical prefixes beside CompVis', and the renamings below them.
struct Walk<'a> {
    modules: &'a BTreeSet<&'a str>,
    pairs: Vec<(String, String, &'static [Inner])>,
}

impl Walk<'_> {
    fn has(&self, prefix: &str) -> bool {
        below(self.modules, prefix).next().is_some()
    }

    /// Notes a pair if the model has such a block.
    fn pair(&mut self, canonical: String, stored: String, inner: &'static [Inner]) -> bool {
        let there = self.has(&canonical);
        if there {
            self.pairs.push((canonical, stored, inner));
        }
        there
    }

    fn top(&mut self) {
        for (canonical, stored, inner) in [
            ("conv_in", "input_blocks.0.0", &[][..]),
            ("time_embedding", "time_embed", TIME),
            ("add_embedding", "label_emb.0", TIME),
            ("conv_norm_out", "out.0", &[]),
            ("conv_out", "out.2", &[]),
        ] {
            self.pair(canonical.to_owned(), stored.to_owned(), inner);
        }
    }

    fn down(&mut self) {
        let mut n = 1;
        for level in 0.. {
            let block = format!("down_blocks.{level}");
            if !self.has(&block) {
                break;
            }
            for layer in 0.. {
                let resnet = format!("{block}.resnets.{layer}");
                if !self.pair(resnet, format!("input_blocks.{n}.0"), RESNET) {
                    break;
                }
                let attention = format!("{block}.attentions.{layer}");
                self.pair(attention, format!("input_blocks.{n}.1"), &[]);
                n += 1;
            }
            let sampler = format!("{block}.downsamplers.0");
            if self.pair(sampler, format!("input_blocks.{n}.0"), DOWNSAMPLE) {
                n += 1;
            }
        }
    }

    fn middle(&mut self) {
        for (canonical, stored, inner) in [
            ("mid_block.resnets.0", "middle_block.0", RESNET),
            ("mid_block.attentions.0", "middle_block.1", &[]),
            ("mid_block.resnets.1", "middle_block.2", RESNET),
        ] {
            self.pair(canonical.to_owned(), stored.to_owned(), inner);
        }
    }

    fn up(&mut self) {
        let mut n = 0usize;
        for level in 0.. {
            let block = format!("up_blocks.{level}");
            if !self.has(&block) {
                break;
            }
            let mut last = 1;
            for layer in 0.. {
                let resnet = format!("{block}.resnets.{layer}");
                if !self.pair(resnet, format!("output_blocks.{n}.0"), RESNET) {
                    break;
                }
                let attention = format!("{block}.attentions.{layer}");
                let attends = self.pair(attention, format!("output_blocks.{n}.1"), &[]);
                last = 1 + usize::from(attends);
                n += 1;
            }
            // the upsampler is the last child of the level's last block
            if let Some(block_index) = n.checked_sub(1) {
                let sampler = format!("{block}.upsamplers.0");
                self.pair(sampler, format!("output_blocks.{block_index}.{last}"), &[]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn compvis_and_diffusers_names_mean_the_same() {
        let tensors = [
            "conv_in.weight",
            "time_embedding.linear_2.weight",
            "down_blocks.0.resnets.0.conv1.weight",
            "down_blocks.0.downsamplers.0.conv.weight",
            "down_blocks.1.resnets.0.time_emb_proj.bias",
            "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0.weight",
            "mid_block.attentions.0.proj_in.weight",
            "up_blocks.0.resnets.0.conv_shortcut.weight",
            "up_blocks.0.attentions.0.proj_out.weight",
            "up_blocks.0.upsamplers.0.conv.weight",
            "up_blocks.1.resnets.0.conv2.weight",
        ];
        let names = Names::of(Owner::Denoiser, tensors.into_iter());
        for (name, module) in [
            ("input_blocks_0_0", "conv_in"),
            ("time_embed_2", "time_embedding.linear_2"),
            (
                "input_blocks_1_0_in_layers_2",
                "down_blocks.0.resnets.0.conv1",
            ),
            ("input_blocks_2_0_op", "down_blocks.0.downsamplers.0.conv"),
            (
                "input_blocks_3_0_emb_layers_1",
                "down_blocks.1.resnets.0.time_emb_proj",
            ),
            (
                "input_blocks_3_1_transformer_blocks_0_attn1_to_out_0",
                "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0",
            ),
            (
                "down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_out",
                "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0",
            ),
            ("middle_block_1_proj_in", "mid_block.attentions.0.proj_in"),
            (
                "output_blocks_0_0_skip_connection",
                "up_blocks.0.resnets.0.conv_shortcut",
            ),
            ("output_blocks_0_2_conv", "up_blocks.0.upsamplers.0.conv"),
            (
                "output_blocks_1_0_out_layers_3",
                "up_blocks.1.resnets.0.conv2",
            ),
        ] {
            let found = names.find(Owner::Denoiser, name).unwrap();
            assert_eq!(
                found,
                [Target {
                    module: module.to_owned(),
                    rows: None,
                    swapped: false,
                }],
                "{name}"
            );
        }
        assert!(names.find(Owner::Denoiser, "output_blocks_9_0").is_none());
    }

    #[test]
    fn a_fused_projection_is_three_modules() {
        let owner = Owner::Text("text_encoder_2");
        let tensors = ["q_proj", "k_proj", "v_proj", "out_proj"]
            .map(|name| format!("encoder.layers.3.self_attn.{name}.weight"));
        let names = Names::of(owner, tensors.iter().map(String::as_str));
        let fused = names
            .find(owner, "model_transformer_resblocks_3_attn_in_proj")
            .unwrap();
        let rows: Vec<_> = fused.iter().map(|t| t.rows.unwrap().index).collect();
        assert_eq!(fused.len(), 3);
        assert_eq!(
            rows,
            fused
                .iter()
                .map(|t| match t.module.chars().nth(27) {
                    Some('q') => 0,
                    Some('k') => 1,
                    _ => 2,
                })
                .collect::<Vec<_>>()
        );
        for name in [
            "text_model_encoder_layers_3_self_attn_out_proj",
            "encoder_layers_3_self_attn_out_proj",
            "transformer_resblocks_3_attn_out_proj",
        ] {
            assert_eq!(names.find(owner, name).unwrap().len(), 1, "{name}");
        }
    }
}
