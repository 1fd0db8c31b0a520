//! T2I-Adapters of single files: structure and names read from the tensors' shapes, in diffusers' spelling (`adapter.body.0.resnets.0.…`) and in
//! the original one, which numbers all residual blocks in one row (`body.0.block1.…`).

use sd_models::t2i_adapter::{Config, Kind};

use super::layout::Layout;
use super::ldm_unet::Shapes;
use super::text_tower::at;

/// More blocks than any adapter has.
const MAX_BLOCKS: usize = 64;
/// Where files keep the network.
const PREFIXES: [&str; 2] = ["adapter", ""];
/// Channels of a hint in colour, and of one in grey.
const HINTS: [usize; 2] = [3, 1];

/// Structure and names of an adapter in a file of these shapes.
///
/// # Errors
/// A sentence that says what is missing or cannot be.
pub(crate) fn read(shapes: &Shapes<'_>) -> Result<(Config, Layout), String> {
    let full = |prefix: &&&str| shapes(&at(prefix, "conv_in.weight")).is_some();
    let light = |prefix: &&&str| shapes(&at(prefix, "body.0.in_conv.weight")).is_some();
    if let Some(prefix) = PREFIXES.iter().find(full) {
        return Reader { prefix, shapes }.full();
    }
    if let Some(prefix) = PREFIXES.iter().find(light) {
        return Reader { prefix, shapes }.light();
    }
    Err("the file holds no T2I-Adapter that is known: neither `conv_in` nor `body.0.in_conv` is there".to_owned())
}

struct Reader<'a> {
    prefix: &'a str,
    shapes: &'a Shapes<'a>,
}

impl Reader<'_> {
    /// Output and input channels of a convolution.
    fn conv(&self, name: &str) -> Result<(usize, usize), String> {
        let name = at(self.prefix, &format!("{name}.weight"));
        match (self.shapes)(&name).as_deref() {
            Some(&[output, input, _, _]) if output > 0 && input > 0 => Ok((output, input)),
            _ => Err(format!(
                "tensor `{name}` is missing or has an unexpected rank"
            )),
        }
    }

    fn has(&self, name: &str) -> bool {
        self.conv(name).is_ok()
    }

    fn count(&self, name: impl Fn(usize) -> String) -> usize {
        (0..MAX_BLOCKS).take_while(|&i| self.has(&name(i))).count()
    }

    /// Channels of the hint and pixels of a side that became channels.
    fn hint(input: usize, factors: &[usize]) -> Result<(usize, usize), String> {
        let mut all = HINTS
            .iter()
            .flat_map(|c| factors.iter().map(move |f| (*c, *f)));
        all.find(|(channels, factor)| channels * factor * factor == input)
            .ok_or_else(|| {
                format!("the adapter's first convolution takes {input} channels, expected 64 or 256 times 1 or 3")
            })
    }

    fn full(&self) -> Result<(Config, Layout), String> {
        let (_, input) = self.conv("conv_in")?;
        let (hint_channels, factor) = Self::hint(input, &[8, 16])?;
        let kind = if factor == 16 { Kind::Xl } else { Kind::Full };
        let nested = self.has("body.0.resnets.0.block1");
        let mut layout = Layout::identity("");
        let mut channels = Vec::new();
        let layers;
        if nested {
            layers = self.count(|i| format!("body.0.resnets.{i}.block1"));
            for i in 0..self.count(|i| format!("body.{i}.resnets.0.block1")) {
                channels.push(self.conv(&format!("body.{i}.resnets.0.block1"))?.0);
            }
            layout.rename("adapter", self.prefix, &[]);
        } else {
            let count = self.count(|i| format!("body.{i}.block1"));
            // the second block is the first to have other channels than the one before it
            let second = (1..count).find(|i| self.has(&format!("body.{i}.in_conv")));
            layers = second.unwrap_or(2).max(1);
            for i in (0..count).step_by(layers) {
                channels.push(self.conv(&format!("body.{i}.block1"))?.0);
            }
            layout.rename("adapter", self.prefix, &[]);
            for i in 0..channels.len() {
                let block = format!("adapter.body.{i}");
                let stored = |j: usize| at(self.prefix, &format!("body.{}", i * layers + j));
                layout.rename(
                    &format!("{block}.in_conv"),
                    &format!("{}.in_conv", stored(0)),
                    &[],
                );
                for j in 0..layers {
                    layout.rename(&format!("{block}.resnets.{j}"), &stored(j), &[]);
                }
            }
        }
        if channels.is_empty() {
            self.conv("body.0.block1")?;
        }
        let config = Config {
            kind,
            hint_channels,
            channels,
            layers,
            factor,
        };
        Ok((config, layout))
    }

    fn light(&self) -> Result<(Config, Layout), String> {
        let (_, input) = self.conv("body.0.in_conv")?;
        let (hint_channels, factor) = Self::hint(input, &[8])?;
        let inner = match self.has("body.0.resnets.0.block1") {
            true => "resnets",
            false => "body",
        };
        let mut layout = Layout::identity("");
        layout.rename("adapter", self.prefix, &[]);
        let mut channels = Vec::new();
        for i in 0..self.count(|i| format!("body.{i}.out_conv")) {
            channels.push(self.conv(&format!("body.{i}.out_conv"))?.0);
            let stored = at(self.prefix, &format!("body.{i}.{inner}"));
            layout.rename(&format!("adapter.body.{i}.resnets"), &stored, &[]);
        }
        let config = Config {
            kind: Kind::Light,
            hint_channels,
            channels,
            layers: self.count(|i| format!("body.0.{inner}.{i}.block1")),
            factor,
        };
        if config.channels.is_empty() {
            self.conv("body.0.out_conv")?;
        }
        Ok((config, layout))
    }
}
