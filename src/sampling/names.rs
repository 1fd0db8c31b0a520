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
    /// DPM++ 2M.
    DpmPp2m,
    /// DPM++ 2S ancestral.
    DpmPp2sA,
}

/// Each sampler with A1111's name first; the rest in the form that [`plain`] makes of names.
const SAMPLERS: &[(Sampler, &str, &[&str])] = &[
    (
        Sampler::Euler,
        "Euler",
        &["euler", "keuler", "eulerdiscrete", "eulerdiscretescheduler"],
    ),
    (
        Sampler::EulerA,
        "Euler a",
        &[
            "eulera",
            "keulera",
            "eulerancestral",
            "keulerancestral",
            "eulerancestraldiscrete",
            "eulerancestraldiscretescheduler",
        ],
    ),
    (
        Sampler::Heun,
        "Heun",
        &["heun", "kheun", "heundiscrete", "heundiscretescheduler"],
    ),
    (
        Sampler::Lms,
        "LMS",
        &["lms", "klms", "lmsdiscrete", "lmsdiscretescheduler"],
    ),
    (
        Sampler::DpmPp2m,
        "DPM++ 2M",
        &[
            "dpm++2m",
            "kdpm++2m",
            "dpmpp2m",
            "kdpmpp2m",
            "dpmsolver++2m",
            "dpmsolvermultistep",
            "dpmsolvermultistepscheduler",
        ],
    ),
    (
        Sampler::DpmPp2sA,
        "DPM++ 2S a",
        &[
            "dpm++2sa",
            "kdpm++2sa",
            "dpmpp2sa",
            "kdpmpp2sa",
            "dpmpp2sancestral",
            "dpm++2sancestral",
            "kdpmpp2sancestral",
        ],
    ),
];

const SCHEDULES: &[(Schedule, &[&str])] = &[
    (
        Schedule::Normal,
        &["normal", "uniform", "discrete", "default"],
    ),
    (Schedule::Karras, &["karras"]),
    (Schedule::Exponential, &["exponential"]),
    (Schedule::SgmUniform, &["sgmuniform"]),
    (Schedule::Simple, &["simple"]),
];

/// Names that exist elsewhere and are not built yet.
const KNOWN_SAMPLERS: &[&str] = &[
    "ddim",
    "plms",
    "pndm",
    "unipc",
    "unipcbh2",
    "lcm",
    "tcd",
    "ddpm",
    "restart",
    "ipndm",
    "ipndmv",
    "deis",
    "dpm2",
    "dpm2a",
    "dpm2ancestral",
    "dpmfast",
    "dpmadaptive",
    "dpm++sde",
    "dpmppsde",
    "dpm++2msde",
    "dpmpp2msde",
    "dpm++2msdeheun",
    "dpm++3msde",
    "dpmpp3msde",
    "dpm++2mv2",
    "heunpp2",
    "ddimcfg++",
    "eulercfgpp",
    "resmultistep",
    "er_sde",
    "uni_pc",
];
const KNOWN_SCHEDULES: &[&str] = &[
    "beta",
    "polyexponential",
    "ddim",
    "ddimuniform",
    "kloptimal",
    "alignyoursteps",
    "ays",
    "gits",
    "turbo",
    "linearquadratic",
    "bong_tangent",
];

impl Sampler {
    /// A1111's name.
    pub fn name(self) -> &'static str {
        SAMPLERS
            .iter()
            .find(|(s, _, _)| *s == self)
            .map_or("", |(_, name, _)| name)
    }

    /// What A1111's schedule "Automatic" means for this sampler.
    pub fn automatic_schedule(self) -> Schedule {
        match self {
            Self::DpmPp2m | Self::DpmPp2sA => Schedule::Karras,
            Self::Euler | Self::EulerA | Self::Heun | Self::Lms => Schedule::Normal,
        }
    }
}

/// Lower case without spaces, hyphens and underscores.
fn plain(name: &str) -> String {
    name.chars()
        .filter(|c| !matches!(c, ' ' | '-' | '_'))
        .flat_map(char::to_lowercase)
        .collect()
}

fn find_sampler(name: &str) -> Option<Sampler> {
    SAMPLERS
        .iter()
        .find(|(_, _, names)| names.contains(&name))
        .map(|(sampler, _, _)| *sampler)
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
pub fn parse(sampler: &str, schedule: Option<&str>) -> Result<(Sampler, Schedule)> {
    let name = plain(sampler);
    let mut folded = None;
    let found = find_sampler(&name).or_else(|| {
        ["karras", "exponential"].iter().find_map(|suffix| {
            let sampler = find_sampler(name.strip_suffix(suffix)?)?;
            folded = find_schedule(suffix);
            Some(sampler)
        })
    });
    let Some(found) = found else {
        let names: Vec<&str> = SAMPLERS.iter().map(|(_, name, _)| *name).collect();
        let base = name
            .strip_suffix("karras")
            .or_else(|| name.strip_suffix("exponential"))
            .unwrap_or(&name);
        let known = KNOWN_SAMPLERS.iter().any(|known| plain(known) == base);
        let list = names.join(", ");
        return Err(if known {
            Error::Unsupported(format!(
                "sampler \"{sampler}\" is not built yet; choose from {list}"
            ))
        } else {
            Error::Usage(format!("unknown sampler \"{sampler}\"; choose from {list}"))
        });
    };
    let schedule = match schedule {
        Some(name) => self::schedule(name)?,
        None => folded,
    };
    Ok((
        found,
        schedule.unwrap_or_else(|| found.automatic_schedule()),
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
    let list = SCHEDULES
        .iter()
        .map(|(s, _)| s.name())
        .collect::<Vec<_>>()
        .join(", ");
    Err(
        if KNOWN_SCHEDULES
            .iter()
            .any(|known| plain(known) == plain_name)
        {
            Error::Unsupported(format!(
                "schedule \"{name}\" is not built yet; choose from Automatic, {list}"
            ))
        } else {
            Error::Usage(format!(
                "unknown schedule \"{name}\"; choose from Automatic, {list}"
            ))
        },
    )
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn every_tools_spelling_is_read() {
        for name in [
            "Euler a",
            "euler_a",
            "k_euler_a",
            "euler_ancestral",
            "EulerAncestralDiscreteScheduler",
        ] {
            assert_eq!(
                parse(name, None).unwrap(),
                (Sampler::EulerA, Schedule::Normal),
                "{name}"
            );
        }
        assert_eq!(
            parse("DPM++ 2M Karras", None).unwrap(),
            (Sampler::DpmPp2m, Schedule::Karras)
        );
        assert_eq!(
            parse("dpmpp_2m", Some("sgm_uniform")).unwrap(),
            (Sampler::DpmPp2m, Schedule::SgmUniform)
        );
        assert_eq!(
            parse("dpm++2m", Some("Automatic")).unwrap().1,
            Schedule::Karras
        );
    }

    #[test]
    fn what_is_not_built_is_named() {
        assert!(matches!(
            parse("DPM++ SDE Karras", None),
            Err(Error::Unsupported(_))
        ));
        assert!(matches!(parse("Eular", None), Err(Error::Usage(_))));
        assert!(matches!(
            parse("Euler", Some("beta")),
            Err(Error::Unsupported(_))
        ));
    }
}
