//! Flags of guidance, regions and shortcuts, and what they ask of the pipeline.

use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::{Map, Value, json};

use crate::error::{Error, Result};
use crate::pipeline::{
    FreeU, FreeUVersion, Gate, Guidance, Measure, Merging, Mimic, Perturbed, Place, Projected,
    Region, Regions, Rule, ScaleSchedule, ScaleShape, Shortcuts,
};

/// Guidance beyond one scale.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Guidance")]
pub struct GuidanceArgs {
    /// Bring this part of the prediction back to the deviation of the prompt's own, 0 to 1; 0.7 is usual for v-prediction [default: 0]
    #[arg(
        long,
        value_name = "F",
        default_value_t = 0.0,
        hide_default_value = true
    )]
    pub cfg_rescale: f64,
    /// The part of the steps at which guidance begins; before it the prompt alone is asked, in half the time [default: 0]
    #[arg(long, value_name = "F", allow_negative_numbers = true)]
    pub cfg_start: Option<f64>,
    /// The part of the steps at which guidance ends [default: 1]
    #[arg(long, value_name = "F", allow_negative_numbers = true)]
    pub cfg_end: Option<f64>,
    /// How --cfg-scale changes from step to step
    #[arg(long, value_name = "CURVE", value_enum, default_value_t)]
    pub cfg_schedule: ScaleShape,
    /// Where that curve ends, or begins
    #[arg(
        long,
        value_name = "F",
        default_value_t = 0.0,
        allow_negative_numbers = true
    )]
    pub cfg_min: f64,
    /// Adaptive projected guidance: high scales that do not burn
    #[arg(long, group = "rule")]
    pub apg: bool,
    /// How much of the part along the prompt's prediction APG keeps
    #[arg(
        long,
        value_name = "F",
        default_value_t = 1.0,
        allow_negative_numbers = true,
        requires = "apg"
    )]
    pub apg_eta: f64,
    /// The most that APG's difference may measure; 0 is no bound
    #[arg(long, value_name = "F", default_value_t = 15.0, requires = "apg")]
    pub apg_threshold: f64,
    /// How much of the last difference APG adds to each; -0.5 is usual [default: none]
    #[arg(
        long,
        value_name = "F",
        allow_negative_numbers = true,
        requires = "apg"
    )]
    pub apg_momentum: Option<f64>,
    /// CFG-Zero*: the negative prediction is scaled to fit; for flow models
    #[arg(long, group = "rule")]
    pub cfg_zero: bool,
    /// How many first steps CFG-Zero* leaves as they are
    #[arg(long, value_name = "N", default_value_t = 1, requires = "cfg_zero")]
    pub cfg_zero_steps: usize,
    /// Perp-Neg: of the negative prompt counts what is perpendicular to the prompt, this much; a third prediction a step
    #[arg(long, value_name = "F", group = "rule", allow_negative_numbers = true)]
    pub perp_neg: Option<f64>,
    /// Tangential damping of the negative prediction
    #[arg(long, group = "rule")]
    pub tcfg: bool,
    /// Dynamic thresholding: a high --cfg-scale that keeps the range of this one
    #[arg(long, value_name = "F", group = "rule", allow_negative_numbers = true)]
    pub mimic_scale: Option<f64>,
    /// The part of the values, 0 to 100, whose range dynamic thresholding measures
    #[arg(
        long,
        value_name = "F",
        default_value_t = 100.0,
        requires = "mimic_scale"
    )]
    pub mimic_percentile: f64,
    /// What dynamic thresholding measures
    #[arg(
        long,
        value_name = "WHAT",
        value_enum,
        default_value_t,
        requires = "mimic_scale"
    )]
    pub mimic_measure: Measure,
    /// How much of dynamic thresholding's result counts
    #[arg(
        long,
        value_name = "F",
        default_value_t = 1.0,
        requires = "mimic_scale"
    )]
    pub mimic_phi: f64,
    /// Dynamic thresholding scales around 0, not around each channel's mean
    #[arg(long, requires = "mimic_scale")]
    pub mimic_from_zero: bool,
    /// Dynamic thresholding measures all channels together
    #[arg(long, requires = "mimic_scale")]
    pub mimic_together: bool,
    /// Perturbed-attention guidance, for UNets; 3 is usual. One more prediction a step [default: none]
    #[arg(long, value_name = "F", allow_negative_numbers = true)]
    pub pag_scale: Option<f64>,
    /// How much less it is for each of the 1000 times of training
    #[arg(long, value_name = "F", default_value_t = 0.0, requires = "pag_scale")]
    pub pag_adaptive_scale: f64,
    /// Parts of the names of the self-attentions that it perturbs
    #[arg(long, value_name = "NAME,…", value_delimiter = ',', default_values_t = ["mid".to_owned()], requires = "pag_scale")]
    pub pag_layers: Vec<String>,
    /// Self-attention guidance, for UNets; 0.75 is usual. One more prediction a step [default: none]
    #[arg(long, value_name = "F", allow_negative_numbers = true)]
    pub sag_scale: Option<f64>,
    /// FreeU, for UNets: other weights of features (B) and skips (S); 1.5,1.6,0.9,0.2 for SD 1.5, 1.3,1.4,0.9,0.2 for XL [default: none]
    #[arg(long, value_name = "B1,B2,S1,S2", value_delimiter = ',', num_args = 1, value_parser = clap::value_parser!(f64), allow_negative_numbers = true)]
    pub freeu: Vec<f64>,
    /// Which FreeU: 1 has constant factors, those of 2 follow the features' mean
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=2), requires = "freeu")]
    pub freeu_version: u8,
}

/// Prompts for parts of the picture.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Regions")]
pub struct RegionArgs {
    /// A prompt for a part of the picture, beside the prompt for all of it: a box in pixels, or in parts of the picture if none is above 1; or
    /// without a box, and then with a --region-mask. The weight is 1 unless it is given. May be repeated
    #[arg(
        long,
        value_name = "[LEFT,TOP,WIDTH,HEIGHT:]PROMPT[:WEIGHT]",
        allow_hyphen_values = true
    )]
    pub region: Vec<String>,
    /// A picture that is white where the first --region without a box counts, grey where it counts less; the next for the second, and so on
    #[arg(long, value_name = "FILE", requires = "region")]
    pub region_mask: Vec<PathBuf>,
    /// How much the prompt of the whole picture counts
    #[arg(long, value_name = "F", default_value_t = 1.0, requires = "region")]
    pub region_base: f64,
}

/// Less work for nearly the same picture.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Shortcuts (approximate: other pictures than without)")]
pub struct ShortcutArgs {
    /// DeepCache, approximate: a UNet computes its inner features at every Nth call alone; 3 is usual
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    pub deep_cache: usize,
    /// Approximate: below this noise level every other step does without the negative prompt, as A1111's NGMS
    #[arg(
        long,
        value_name = "SIGMA",
        default_value_t = 0.0,
        hide_default_value = true,
        allow_negative_numbers = true
    )]
    pub ngms: f64,
    /// Below that level all steps do
    #[arg(long, requires = "ngms")]
    pub ngms_all: bool,
    /// T-GATE, approximate, for UNets: behind so many steps there is no guidance, and the text is not read again; half of the steps are usual
    #[arg(long, value_name = "STEPS")]
    pub tgate: Option<usize>,
    /// Of those steps, the first ones at which T-GATE computes self-attention in any case
    #[arg(long, value_name = "N", default_value_t = 2, requires = "tgate")]
    pub tgate_warm_up: usize,
    /// Then T-GATE computes self-attention at every Nth step alone; its authors' package takes 5
    #[arg(long, value_name = "N", default_value_t = 1, requires = "tgate")]
    pub tgate_sp_interval: usize,
    /// The same behind the gate
    #[arg(long, value_name = "N", default_value_t = 1, requires = "tgate")]
    pub tgate_fi_interval: usize,
    /// Token merging (ToMe), approximate, for UNets: this part of the tokens, below 0.75, joins others like them in self-attention, as A1111's token merging ratio
    #[arg(
        long,
        value_name = "F",
        alias = "token-merging-ratio",
        default_value_t = 0.0,
        hide_default_value = true,
        allow_negative_numbers = true
    )]
    pub tome: f64,
    /// Tokens are merged where the network's pictures are at most so many times smaller than the latents: 1, 2, 4 or 8; Stable Diffusion XL needs 2
    #[arg(long, value_name = "N", default_value_t = 1, requires = "tome")]
    pub tome_max_downsample: usize,
    /// Which of each four tokens stays is drawn from the seed, as tomesd does by itself; else it is the first, as in A1111
    #[arg(long, requires = "tome")]
    pub tome_random: bool,
}

impl GuidanceArgs {
    /// What the flags ask for.
    ///
    /// # Errors
    /// [`Error::Usage`] when FreeU has not four numbers.
    pub fn guidance(&self) -> Result<Guidance> {
        let span = (self.cfg_start.is_some() || self.cfg_end.is_some())
            .then(|| (self.cfg_start.unwrap_or(0.0), self.cfg_end.unwrap_or(1.0)));
        let free_u = match self.freeu.as_slice() {
            [] => None,
            &[b1, b2, s1, s2] => Some(FreeU {
                features: [b1, b2],
                skips: [s1, s2],
                version: match self.freeu_version {
                    2 => FreeUVersion::Second,
                    _ => FreeUVersion::First,
                },
            }),
            other => {
                return Err(Error::Usage(format!(
                    "--freeu has {} numbers, expected four: B1,B2,S1,S2, such as 1.5,1.6,0.9,0.2",
                    other.len()
                )));
            }
        };
        Ok(Guidance {
            span,
            schedule: ScaleSchedule {
                shape: self.cfg_schedule,
                least: self.cfg_min,
            },
            rescale: self.cfg_rescale,
            rule: self.rule(),
            perturbed: self
                .pag_scale
                .filter(|scale| *scale != 0.0)
                .map(|scale| Perturbed {
                    scale,
                    adaptive: self.pag_adaptive_scale,
                    layers: self.pag_layers.clone(),
                }),
            self_attention: self.sag_scale.filter(|scale| *scale != 0.0),
            free_u,
        })
    }

    fn rule(&self) -> Rule {
        if self.apg {
            return Rule::Projected(Projected {
                eta: self.apg_eta,
                threshold: self.apg_threshold,
                momentum: self.apg_momentum,
            });
        }
        if self.cfg_zero {
            return Rule::ZeroStar {
                zero_steps: self.cfg_zero_steps,
            };
        }
        if self.tcfg {
            return Rule::Tangential;
        }
        match (self.perp_neg, self.mimic_scale) {
            (Some(scale), _) => Rule::Perpendicular { scale },
            (None, Some(scale)) => Rule::Mimic(Mimic {
                scale,
                percentile: self.mimic_percentile,
                phi: self.mimic_phi,
                measure: self.mimic_measure,
                from_zero: self.mimic_from_zero,
                together: self.mimic_together,
            }),
            (None, None) => Rule::Plain,
        }
    }
}

impl ShortcutArgs {
    /// What the flags ask for.
    pub fn shortcuts(&self) -> Shortcuts {
        let merging = Merging {
            ratio: self.tome,
            max_downsample: self.tome_max_downsample,
            random: self.tome_random,
        };
        Shortcuts {
            deep_cache: self.deep_cache,
            least_negative_sigma: self.ngms,
            at_all_calls: self.ngms_all,
            gate: self.tgate.map(|step| Gate {
                step,
                warm_up: self.tgate_warm_up,
                interval: self.tgate_sp_interval,
                late_interval: self.tgate_fi_interval,
            }),
            merging: (self.tome != 0.0).then_some(merging),
        }
    }
}

impl RegionArgs {
    /// What the flags ask for; `read` opens a mask.
    ///
    /// # Errors
    /// [`Error::Usage`] when a region has neither box nor mask, or a mask no region; whatever `read` gives.
    pub fn regions(&self, read: &dyn Fn(&Path) -> Result<Place>) -> Result<Regions> {
        let mut masks = self.region_mask.iter();
        let mut list = Vec::with_capacity(self.region.len());
        for flag in &self.region {
            let boxed = take_box(flag);
            let (prompt, weight) = take_weight(boxed.map_or(flag.as_str(), |(_, rest)| rest));
            let place = match (boxed, boxed.map_or_else(|| masks.next(), |_| None)) {
                (Some((sides, _)), _) => Place::Box(sides),
                (None, Some(mask)) => read(mask)?,
                (None, None) => {
                    return Err(Error::Usage(format!(
                        "--region {flag:?} has no place, expected LEFT,TOP,WIDTH,HEIGHT:PROMPT or a --region-mask for it"
                    )));
                }
            };
            list.push(Region {
                prompt: prompt.to_owned(),
                place,
                weight,
            });
        }
        if let Some(mask) = masks.next() {
            return Err(Error::Usage(format!(
                "--region-mask {} belongs to no --region without a box",
                mask.display()
            )));
        }
        Ok(Regions {
            list,
            base: self.region_base,
        })
    }
}

/// Four numbers and what stands behind them.
fn take_box(flag: &str) -> Option<([f64; 4], &str)> {
    let (sides, rest) = flag.split_once(':')?;
    let numbers = sides.split(',').map(|side| side.trim().parse::<f64>());
    let numbers = numbers.collect::<std::result::Result<Vec<f64>, _>>().ok()?;
    Some((numbers.try_into().ok()?, rest))
}

/// A prompt and the weight behind it.
fn take_weight(text: &str) -> (&str, f64) {
    match text.rsplit_once(':') {
        Some((prompt, weight)) => match weight.trim().parse() {
            Ok(weight) => (prompt, weight),
            Err(_) => (text, 1.0),
        },
        None => (text, 1.0),
    }
}

/// What a picture's exact request says of all this; what is as usual is left out.
pub(in crate::cli) fn record(
    guidance: &Guidance,
    shortcuts: &Shortcuts,
    regions: &Regions,
) -> Map<String, Value> {
    let mut all = Map::new();
    let mut put = |key: &str, value: Value| {
        all.insert(key.to_owned(), value);
    };
    if let Some((start, end)) = guidance.span {
        put("cfg_interval", json!([start, end]));
    }
    if guidance.schedule.shape != ScaleShape::Constant {
        let shape = shape_name(guidance.schedule.shape);
        put(
            "cfg_schedule",
            json!({ "curve": shape, "min": guidance.schedule.least }),
        );
    }
    if guidance.rescale != 0.0 {
        put("cfg_rescale", json!(guidance.rescale));
    }
    match &guidance.rule {
        Rule::Plain => {}
        Rule::Projected(apg) => put(
            "apg",
            json!({ "eta": apg.eta, "threshold": apg.threshold, "momentum": apg.momentum }),
        ),
        Rule::ZeroStar { zero_steps } => put("cfg_zero", json!({ "zero_steps": zero_steps })),
        Rule::Perpendicular { scale } => put("perp_neg", json!(scale)),
        Rule::Tangential => put("tcfg", json!(true)),
        Rule::Mimic(mimic) => put(
            "dynamic_thresholding",
            json!({
                "mimic_scale": mimic.scale, "percentile": mimic.percentile, "measure": measure_name(mimic.measure), "phi": mimic.phi,
                "from_zero": mimic.from_zero, "together": mimic.together,
            }),
        ),
    }
    if let Some(pag) = &guidance.perturbed {
        put(
            "perturbed_attention",
            json!({ "scale": pag.scale, "adaptive_scale": pag.adaptive, "layers": pag.layers }),
        );
    }
    if let Some(scale) = guidance.self_attention {
        put("self_attention_guidance", json!(scale));
    }
    if let Some(free_u) = guidance.free_u {
        let version = 1 + u8::from(free_u.version == FreeUVersion::Second);
        put(
            "freeu",
            json!({ "b": free_u.features, "s": free_u.skips, "version": version }),
        );
    }
    if shortcuts.deep_cache > 1 {
        put("deep_cache", json!(shortcuts.deep_cache));
    }
    if shortcuts.least_negative_sigma > 0.0 {
        let sigma = shortcuts.least_negative_sigma;
        put(
            "ngms",
            json!({ "sigma": sigma, "all": shortcuts.at_all_calls }),
        );
    }
    if let Some(gate) = &shortcuts.gate {
        put(
            "tgate",
            json!({ "step": gate.step, "warm_up": gate.warm_up, "sp_interval": gate.interval, "fi_interval": gate.late_interval }),
        );
    }
    if let Some(merging) = &shortcuts.merging {
        put(
            "token_merging",
            json!({ "ratio": merging.ratio, "max_downsample": merging.max_downsample, "random": merging.random }),
        );
    }
    if !regions.list.is_empty() {
        let regions_of = regions.list.iter().map(|region| {
            let place = match &region.place {
                Place::Box(sides) => json!(sides),
                Place::Mask { width, height, .. } => json!(format!("mask {width}x{height}")),
            };
            json!({ "prompt": region.prompt, "place": place, "weight": region.weight })
        });
        put("regions", regions_of.collect());
        put("region_base", json!(regions.base));
    }
    all
}

/// The same for A1111's line: its own keys, those of Forge's and of its extensions where there are such. `twice`: there is a second pass.
pub(in crate::cli) fn infotext(
    guidance: &Guidance,
    shortcuts: &Shortcuts,
    twice: bool,
) -> Vec<(String, String)> {
    let mut pairs = Vec::new();
    let mut put = |key: &str, value: String| pairs.push((key.to_owned(), value));
    if let Rule::Mimic(mimic) = &guidance.rule {
        put("Dynamic thresholding enabled", "True".to_owned());
        put("Mimic scale", mimic.scale.to_string());
        put("Threshold percentile", mimic.percentile.to_string());
        let separate = if mimic.together { "False" } else { "True" };
        put("Separate Feature Channels", separate.to_owned());
        let from = if mimic.from_zero { "ZERO" } else { "MEAN" };
        put("Scaling Startpoint", from.to_owned());
        put(
            "Variability Measure",
            measure_name(mimic.measure).to_owned(),
        );
        put("Interpolate Phi", mimic.phi.to_string());
        if guidance.schedule.shape != ScaleShape::Constant {
            let shape = match guidance.schedule.shape {
                ScaleShape::Constant => "Constant",
                ScaleShape::LinearDown => "Linear Down",
                ScaleShape::LinearUp => "Linear Up",
                ScaleShape::CosineDown => "Cosine Down",
                ScaleShape::CosineUp => "Cosine Up",
            };
            put("CFG mode", shape.to_owned());
            put("CFG scale minimum", guidance.schedule.least.to_string());
        }
    }
    if let Some(free_u) = &guidance.free_u {
        let ([b1, b2], [s1, s2]) = (free_u.features, free_u.skips);
        for (key, value) in [
            ("freeu_b1", b1),
            ("freeu_b2", b2),
            ("freeu_s1", s1),
            ("freeu_s2", s2),
        ] {
            put(key, value.to_string());
        }
        put("freeu_enabled", "True".to_owned());
    }
    if let Some(merging) = &shortcuts.merging {
        put("Token merging ratio", merging.ratio.to_string());
        if twice {
            put("Token merging ratio hr", merging.ratio.to_string());
        }
    }
    if let Some(gate) = &shortcuts.gate {
        put("T-GATE step", gate.step.to_string());
    }
    if shortcuts.least_negative_sigma > 0.0 {
        put("NGMS", shortcuts.least_negative_sigma.to_string());
        if shortcuts.at_all_calls {
            put("NGMS all steps", "True".to_owned());
        }
    }
    pairs
}

fn shape_name(shape: ScaleShape) -> &'static str {
    match shape {
        ScaleShape::Constant => "constant",
        ScaleShape::LinearDown => "linear-down",
        ScaleShape::LinearUp => "linear-up",
        ScaleShape::CosineDown => "cosine-down",
        ScaleShape::CosineUp => "cosine-up",
    }
}

fn measure_name(measure: Measure) -> &'static str {
    match measure {
        Measure::Ad => "AD",
        Measure::Std => "STD",
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_region_is_a_box_a_prompt_and_a_weight() {
        let args = |region: &[&str], masks: usize| RegionArgs {
            region: region.iter().map(|&r| r.to_owned()).collect(),
            region_mask: vec![PathBuf::from("mask.png"); masks],
            region_base: 1.0,
        };
        let read = |_: &Path| {
            Ok(Place::Mask {
                width: 1,
                height: 1,
                values: vec![0.5],
            })
        };
        let one = |flag: &str| {
            let regions = args(&[flag], 0).regions(&read).unwrap();
            regions.list.into_iter().next().unwrap()
        };
        let region = one("0, 0.5,1,0.5:a (red:1.2) fox: at dusk:1.5");
        assert_eq!(region.place, Place::Box([0.0, 0.5, 1.0, 0.5]));
        assert_eq!(region.prompt, "a (red:1.2) fox: at dusk");
        assert_eq!(region.weight, 1.5);
        assert_eq!(one("0,0,8,8:a fox").weight, 1.0);
        let mixed = args(&["8,8,64,64:a fox", "a hen:2"], 1).regions(&read);
        let mixed = mixed.unwrap().list;
        assert_eq!(mixed[1].prompt, "a hen");
        assert!(matches!(mixed[1].place, Place::Mask { width: 1, .. }));
        for (region, masks) in [
            (&["a fox"][..], 0),
            (&["0,0,8,8:a fox"], 1),
            (&["1,2,3:x"], 0),
        ] {
            let refused = args(region, masks).regions(&read).unwrap_err();
            assert!(refused.to_string().contains("--region"), "{region:?}");
        }
    }
}
