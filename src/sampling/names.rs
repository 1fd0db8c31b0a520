//! Samplers and schedules by the names that A1111, ComfyUI, diffusers and stable-diffusion.cpp give them.

use super::spacing::Schedule;
use crate::error::{Error, Result};

/// A sampler of k-diffusion.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sampler {
    /// Euler.
    Euler,
    /// Euler ancestral.
    EulerA,
    /// Heun.
    Heun,
    /// Linear multistep.
    Lms,
    /// DPM-Solver-2.
    Dpm2,
    /// DPM-Solver-2, ancestral.
    Dpm2A,
    /// DPM++ 2M.
    DpmPp2m,
    /// DPM++ 2S ancestral.
    DpmPp2sA,
    /// DPM++ SDE.
    DpmPpSde,
    /// DPM++ 2M SDE.
    DpmPp2mSde,
    /// DPM++ 2M SDE, the solver's second type.
    DpmPp2mSdeHeun,
    /// DPM++ 3M SDE.
    DpmPp3mSde,
    /// DPM fast.
    DpmFast,
    /// Restart.
    Restart,
    /// Heun++.
    HeunPp2,
    /// iPNDM.
    Ipndm,
    /// iPNDM with weights by the levels.
    IpndmV,
    /// DDIM by whole timesteps.
    Ddim,
    /// PLMS by whole timesteps.
    Plms,
    /// UniPC.
    UniPc,
    /// Latent consistency models.
    Lcm,
    /// Trajectory consistency models.
    Tcd,
}

/// Each sampler with A1111's name first; the rest in the form that [`plain`] makes of names.
const SAMPLERS: &[(Sampler, &str, &[&str])] = &[
    (
        Sampler::Euler,
        "Euler",
        &[
            "euler",
            "eulerdiscrete",
            "flowmatcheuler",
            "flowmatcheulerdiscrete",
        ],
    ),
    (
        Sampler::EulerA,
        "Euler a",
        &["eulera", "eulerancestral", "eulerancestraldiscrete"],
    ),
    (
        Sampler::Heun,
        "Heun",
        &["heun", "heundiscrete", "flowmatchheundiscrete"],
    ),
    (Sampler::Lms, "LMS", &["lms", "lmsdiscrete"]),
    (
        Sampler::Dpm2,
        "DPM2",
        &["dpm2", "kdpm2discrete", "dpm2discrete"],
    ),
    (
        Sampler::Dpm2A,
        "DPM2 a",
        &[
            "dpm2a",
            "dpm2ancestral",
            "kdpm2ancestraldiscrete",
            "dpm2ancestraldiscrete",
        ],
    ),
    (
        Sampler::DpmPp2m,
        "DPM++ 2M",
        &["dpm++2m", "dpmsolver++2m", "dpmsolvermultistep"],
    ),
    (
        Sampler::DpmPp2sA,
        "DPM++ 2S a",
        &["dpm++2sa", "dpm++2sancestral"],
    ),
    (
        Sampler::DpmPpSde,
        "DPM++ SDE",
        &["dpm++sde", "dpm++sdegpu", "dpmsolversde"],
    ),
    (
        Sampler::DpmPp2mSde,
        "DPM++ 2M SDE",
        &["dpm++2msde", "dpm++2msdegpu"],
    ),
    (
        Sampler::DpmPp2mSdeHeun,
        "DPM++ 2M SDE Heun",
        &["dpm++2msdeheun", "dpm++2msdeheungpu"],
    ),
    (
        Sampler::DpmPp3mSde,
        "DPM++ 3M SDE",
        &["dpm++3msde", "dpm++3msdegpu"],
    ),
    (Sampler::DpmFast, "DPM fast", &["dpmfast"]),
    (Sampler::Restart, "Restart", &["restart"]),
    (Sampler::HeunPp2, "HeunPP2", &["heunpp2", "heun++2"]),
    (Sampler::Ipndm, "IPNDM", &["ipndm"]),
    (Sampler::IpndmV, "IPNDM_V", &["ipndmv"]),
    (Sampler::Ddim, "DDIM", &["ddim"]),
    (Sampler::Plms, "PLMS", &["plms", "pndm"]),
    (Sampler::UniPc, "UniPC", &["unipc", "unipcmultistep"]),
    (Sampler::Lcm, "LCM", &["lcm", "flowmatchlcm"]),
    (Sampler::Tcd, "TCD", &["tcd"]),
];

const SCHEDULES: &[(Schedule, &[&str])] = &[
    (
        Schedule::Normal,
        &["normal", "uniform", "discrete", "default"],
    ),
    (Schedule::Karras, &["karras"]),
    (Schedule::Exponential, &["exponential", "polyexponential"]),
    (Schedule::SgmUniform, &["sgmuniform"]),
    (Schedule::Simple, &["simple"]),
    (Schedule::Ddim, &["ddim", "ddimuniform"]),
    (Schedule::Beta, &["beta"]),
    (Schedule::KlOptimal, &["kloptimal"]),
    (Schedule::AlignYourSteps, &["alignyoursteps", "ays"]),
    (Schedule::Turbo, &["turbo", "sdturbo"]),
];

/// Names that exist elsewhere and are not built yet.
const KNOWN_SAMPLERS: &[&str] = &[
    "ddimtrailing",
    "ddimcfg++",
    "unipcbh2",
    "ddpm",
    "deis",
    "deismultistep",
    "dpmadaptive",
    "dpmad",
    "dpm++2mv2",
    "dpm++2mcfg++",
    "dpm++2sacfg++",
    "dpm++2sancestralcfg++",
    "dpm++2mbt",
    "dpmsolversinglestep",
    "eulercfg++",
    "euleracfg++",
    "eulerancestralcfg++",
    "resmultistep",
    "resmultistepcfg++",
    "resmultistepancestral",
    "res2s",
    "ersde",
    "gradientestimation",
    "seeds2",
    "seeds3",
    "sasolver",
];
const KNOWN_SCHEDULES: &[&str] = &[
    "gits",
    "ays32",
    "linearquadratic",
    "bongtangent",
    "smoothstep",
    "lcm",
    "klopt",
    "betasd",
    "flow",
    "phi",
    "laplace",
];

impl Sampler {
    /// A1111's name.
    pub fn name(self) -> &'static str {
        SAMPLERS
            .iter()
            .find(|(s, _, _)| *s == self)
            .map_or("", |(_, name, _)| name)
    }

    /// What A1111's schedule "Automatic" means for this sampler; on flow models, which A1111 has no word on, it is Simple.
    pub fn automatic_schedule(self, flow: bool) -> Schedule {
        match self {
            _ if flow => Schedule::Simple,
            Self::Tcd => Schedule::Simple,
            Self::DpmPp2m | Self::DpmPp2sA | Self::DpmPpSde | Self::Dpm2 | Self::Dpm2A => {
                Schedule::Karras
            }
            Self::DpmPp2mSde | Self::DpmPp2mSdeHeun | Self::DpmPp3mSde => Schedule::Exponential,
            Self::Restart => Schedule::Karras,
            _ => Schedule::Normal,
        }
    }

    /// Whether it is for models that were distilled at few timesteps.
    pub(super) fn is_distilled(self) -> bool {
        matches!(self, Self::Lcm | Self::Tcd)
    }

    /// Whether A1111 (on flow models ComfyUI) makes one level more and leaves out the last before the end.
    pub(super) fn skips_last_but_one(self, flow: bool) -> bool {
        matches!(self, Self::Dpm2 | Self::Dpm2A) || (self == Self::DpmPp3mSde && !flow)
    }

    /// Whether it goes by whole timesteps, which no schedule moves.
    pub(super) fn goes_by_timesteps(self) -> bool {
        matches!(self, Self::Ddim | Self::Plms | Self::UniPc)
    }

    /// Whether it is made for latents `x₀ + σ·ε`.
    pub(super) fn is_for_betas(self) -> bool {
        self.goes_by_timesteps() || matches!(self, Self::Tcd | Self::DpmFast | Self::Restart)
    }

    /// Whether its noise comes from a Brownian motion, and its steps from ln(α/σ).
    pub(super) fn is_stochastic(self) -> bool {
        matches!(
            self,
            Self::DpmPpSde | Self::DpmPp2mSde | Self::DpmPp2mSdeHeun | Self::DpmPp3mSde
        )
    }
}

/// Lower case without spaces, hyphens, underscores and full stops; "pp" is "++", a "scheduler" at the end is dropped.
fn plain(name: &str) -> String {
    let name: String = name
        .chars()
        .filter(|c| !matches!(c, ' ' | '-' | '_' | '.'))
        .flat_map(char::to_lowercase)
        .collect();
    let name = name.replace("dpmpp", "dpm++").replace("cfgpp", "cfg++");
    name.strip_suffix("scheduler").unwrap_or(&name).to_owned()
}

/// The sampler of a plain name, also behind the `k_` of k-diffusion and old diffusers.
fn find_sampler(name: &str) -> Option<Sampler> {
    let found = |name: &str| {
        let row = SAMPLERS.iter().find(|(_, _, names)| names.contains(&name));
        row.map(|(sampler, _, _)| *sampler)
    };
    found(name).or_else(|| found(name.strip_prefix('k')?))
}

fn find_schedule(name: &str) -> Option<Schedule> {
    SCHEDULES
        .iter()
        .find(|(_, names)| names.contains(&name))
        .map(|(schedule, _)| *schedule)
}

/// Reads a sampler's and a schedule's name; old A1111 names such as "DPM++ 2M Karras" hold both. The schedule is A1111's "Automatic" when
/// none is named.
///
/// # Errors
/// [`Error::Unsupported`] for names that other tools know, [`Error::Usage`] for the rest, with the names to choose from.
pub fn parse(sampler: &str, schedule: Option<&str>, flow: bool) -> Result<(Sampler, Schedule)> {
    let name = plain(sampler);
    let (base, folded) = without_schedule(&name);
    let Some(found) = find_sampler(base) else {
        return Err(unknown_sampler(sampler, base));
    };
    let schedule = match schedule {
        Some(name) => self::schedule(name)?.or(folded),
        None => folded,
    };
    Ok((
        found,
        schedule.unwrap_or_else(|| found.automatic_schedule(flow)),
    ))
}

/// A sampler's plain name without the schedule that it may end in.
fn without_schedule(name: &str) -> (&str, Option<Schedule>) {
    if find_sampler(name).is_some() {
        return (name, None);
    }
    let endings = SCHEDULES
        .iter()
        .flat_map(|(schedule, names)| names.iter().map(|name| (*schedule, *name)));
    let mut cut =
        endings.filter_map(|(schedule, ending)| Some((name.strip_suffix(ending)?, Some(schedule))));
    // some schedules' names end in others': the right cut leaves a sampler
    let known = |base: &str| find_sampler(base).is_some() || is_known_sampler(base);
    cut.find(|(base, _)| known(base)).unwrap_or((name, None))
}

/// Whether another tool has a sampler of this plain name.
fn is_known_sampler(name: &str) -> bool {
    let known = |name: &str| KNOWN_SAMPLERS.contains(&name);
    known(name) || name.strip_prefix('k').is_some_and(known)
}

fn unknown_sampler(name: &str, base: &str) -> Error {
    let names: Vec<&str> = SAMPLERS.iter().map(|(_, name, _)| *name).collect();
    let list = names.join(", ");
    let bare = base.strip_prefix('k').unwrap_or(base);
    if matches!(bare, "dpmadaptive" | "dpmad") {
        return Error::Unsupported(format!(
            "sampler \"{name}\" chooses its steps by what the picture looks like on the way, which runs here do not; choose DPM fast or from {list}"
        ));
    }
    if is_known_sampler(base) {
        return Error::Unsupported(format!(
            "sampler \"{name}\" is not built yet; choose from {list}"
        ));
    }
    let guess = nearest(base, &names);
    Error::Usage(format!(
        "unknown sampler \"{name}\"{guess}; choose from {list}"
    ))
}

/// Reads a schedule's name; `None` for "automatic".
fn schedule(name: &str) -> Result<Option<Schedule>> {
    let plain_name = plain(name);
    if matches!(plain_name.as_str(), "automatic" | "auto") {
        return Ok(None);
    }
    if let Some(schedule) = find_schedule(&plain_name) {
        return Ok(Some(schedule));
    }
    let names: Vec<&str> = SCHEDULES.iter().map(|(s, _)| s.name()).collect();
    let list = names.join(", ");
    if KNOWN_SCHEDULES.contains(&plain_name.as_str()) {
        return Err(Error::Unsupported(format!(
            "schedule \"{name}\" is not built yet; choose from Automatic, {list}"
        )));
    }
    let guess = nearest(&plain_name, &names);
    Err(Error::Usage(format!(
        "unknown schedule \"{name}\"{guess}; choose from Automatic, {list}"
    )))
}

/// ", did you mean …?" when a name is close to one of `names`.
fn nearest(wrong: &str, names: &[&str]) -> String {
    let best = names.iter().map(|name| (edits(wrong, &plain(name)), name));
    match best.min_by_key(|(distance, _)| *distance) {
        Some((distance, name)) if distance <= 1 + wrong.chars().count() / 4 => {
            format!(", did you mean \"{name}\"?")
        }
        _ => String::new(),
    }
}

/// Levenshtein's distance.
fn edits(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = i;
        let mut left = i + 1;
        for (cell, y) in row.iter_mut().skip(1).zip(&b) {
            let replaced = diagonal + usize::from(x != *y);
            diagonal = *cell;
            *cell = replaced.min(diagonal + 1).min(left + 1);
            left = *cell;
        }
        if let Some(first) = row.first_mut() {
            *first = i + 1;
        }
    }
    row.last().copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn every_tools_spelling_is_read() {
        let spellings: &[(Sampler, &[&str])] = &[
            (
                Sampler::Euler,
                &["Euler", "euler", "k_euler", "EulerDiscreteScheduler"],
            ),
            (
                Sampler::EulerA,
                &[
                    "Euler a",
                    "euler_a",
                    "k_euler_a",
                    "euler_ancestral",
                    "EulerAncestralDiscreteScheduler",
                    "EULER A",
                ],
            ),
            (Sampler::Heun, &["Heun", "k_heun", "HeunDiscreteScheduler"]),
            (
                Sampler::Lms,
                &["LMS", "lms", "k_lms", "LMSDiscreteScheduler"],
            ),
            (
                Sampler::Dpm2,
                &["DPM2", "dpm_2", "dpm2", "k_dpm_2", "KDPM2DiscreteScheduler"],
            ),
            (
                Sampler::Dpm2A,
                &[
                    "DPM2 a",
                    "dpm_2_ancestral",
                    "k_dpm_2_a",
                    "KDPM2AncestralDiscreteScheduler",
                ],
            ),
            (
                Sampler::DpmPp2m,
                &[
                    "DPM++ 2M",
                    "dpmpp_2m",
                    "dpm++2m",
                    "k_dpmpp_2m",
                    "DPMSolverMultistepScheduler",
                ],
            ),
            (
                Sampler::DpmPp2sA,
                &[
                    "DPM++ 2S a",
                    "dpmpp_2s_ancestral",
                    "dpm++2s_a",
                    "k_dpmpp_2s_a",
                ],
            ),
            (
                Sampler::Lcm,
                &[
                    "LCM",
                    "lcm",
                    "k_lcm",
                    "LCMScheduler",
                    "FlowMatchLCMScheduler",
                ],
            ),
            (Sampler::Tcd, &["TCD", "tcd", "TCDScheduler"]),
            (Sampler::Euler, &["FlowMatchEulerDiscreteScheduler"]),
            (Sampler::Heun, &["FlowMatchHeunDiscreteScheduler"]),
        ];
        for (sampler, names) in spellings {
            for name in *names {
                let (found, schedule) = parse(name, None, false).unwrap();
                assert_eq!(
                    (found, schedule),
                    (*sampler, sampler.automatic_schedule(false)),
                    "{name}"
                );
            }
        }
    }

    #[test]
    fn old_names_carry_the_schedule() {
        assert_eq!(
            parse("LMS Karras", None, false).unwrap(),
            (Sampler::Lms, Schedule::Karras)
        );
        assert_eq!(
            parse("Euler a SGM Uniform", None, false).unwrap(),
            (Sampler::EulerA, Schedule::SgmUniform)
        );
        assert_eq!(
            parse("DPM++ 2M Karras", Some("Automatic"), false)
                .unwrap()
                .1,
            Schedule::Karras
        );
        assert_eq!(
            parse("DPM++ 2M Karras", Some("Simple"), false).unwrap().1,
            Schedule::Simple
        );
        for (schedule, _) in SCHEDULES {
            assert_eq!(
                parse("Euler", Some(schedule.name()), false).unwrap().1,
                *schedule
            );
        }
    }

    #[test]
    fn written_names_are_read_again() {
        for (sampler, _, _) in SAMPLERS {
            for flow in [false, true] {
                let schedule = sampler.automatic_schedule(flow);
                let written = (sampler.name(), Some(schedule.name()));
                assert_eq!(
                    parse(written.0, written.1, flow).unwrap(),
                    (*sampler, schedule)
                );
                let automatic = parse(sampler.name(), Some("Automatic"), flow).unwrap();
                assert_eq!(automatic, (*sampler, schedule));
            }
            assert_eq!(sampler.automatic_schedule(true), Schedule::Simple);
        }
    }

    #[test]
    fn what_is_not_built_is_named() {
        for name in ["uni_pc_bh2", "DDIM CFG++", "k_dpm_ad", "DPM adaptive"] {
            assert!(
                matches!(parse(name, None, false), Err(Error::Unsupported(_))),
                "{name}"
            );
        }
        assert!(matches!(
            parse("Euler", Some("gits"), false),
            Err(Error::Unsupported(_))
        ));
        let error = parse("Eular", None, false).unwrap_err();
        assert!(
            matches!(error, Error::Usage(_))
                && error.to_string().contains("did you mean \"Euler\"?"),
            "{error}"
        );
        let error = parse("Euler", Some("Kerras"), false)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("did you mean \"Karras\"?") && error.contains("SGM Uniform"),
            "{error}"
        );
    }
}
