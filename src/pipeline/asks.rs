//! What the networks are asked at each call of a run, known before it.

use sd_models::variant::{Tap, Variant};

use super::guidance::{Rule, resolve};
use super::{Engine, Plan};
use crate::error::Result;
use crate::sampling::Call;

/// Who speaks to the network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Text {
    /// The negative prompt, without the picture that the others see.
    Unseen,
    Negative,
    Prompt,
    /// Of a region.
    Region(usize),
    Empty,
}

/// A plan of a network: whose, for which texts, changed how.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Ask {
    /// 0 for the model, 1 for its refiner.
    pub(super) turn: usize,
    pub(super) texts: Vec<Text>,
    pub(super) variant: Variant,
    /// Which of the pictures that steer act.
    pub(super) acting: Vec<bool>,
}

/// What is asked at one call.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Asks {
    pub(super) main: Ask,
    /// The texts that are not to be seen, where a picture steers only what the others predict.
    pub(super) apart: Option<Ask>,
    /// The network without some layers.
    pub(super) lacking: Option<Ask>,
    /// The network with perturbed attention, and the scale.
    pub(super) perturbed: Option<(Ask, f64)>,
    /// The network on blurred latents.
    pub(super) degraded: Option<Ask>,
}

impl Text {
    /// Whether it says what is to be seen.
    pub(super) fn is_positive(self) -> bool {
        matches!(self, Self::Prompt | Self::Region(_))
    }
}

impl Asks {
    /// Every plan that is used.
    pub(super) fn all(&self) -> impl Iterator<Item = &Ask> {
        let perturbed = self.perturbed.iter().map(|(ask, _)| ask);
        let others = self.apart.iter().chain(&self.lacking).chain(perturbed);
        let others = others.chain(&self.degraded);
        std::iter::once(&self.main).chain(others)
    }

    /// For how many texts each of the plans is that are there at once, where they are most.
    pub(super) fn most_at_once(all: &[Self]) -> Vec<usize> {
        let mut spans: Vec<(&Ask, usize, usize)> = Vec::new();
        for (i, ask) in all
            .iter()
            .enumerate()
            .flat_map(|(i, asks)| asks.all().map(move |ask| (i, ask)))
        {
            match spans.iter_mut().find(|(known, ..)| *known == ask) {
                Some((_, _, last)) => *last = i,
                None => spans.push((ask, i, i)),
            }
        }
        let at = |i: usize| -> Vec<usize> {
            let there = spans
                .iter()
                .filter(|(_, from, to)| (*from..=*to).contains(&i));
            there.map(|(ask, ..)| ask.texts.len()).collect()
        };
        let sets = (0..all.len()).map(at);
        sets.max_by_key(|texts| texts.iter().sum::<usize>())
            .unwrap_or_default()
    }

    /// What is asked at every call of `plan`.
    ///
    /// # Errors
    /// When layers are named that a network does not have.
    pub(super) fn of(engine: &Engine, plan: &Plan) -> Result<Vec<Self>> {
        let mut all: Vec<Self> = Vec::with_capacity(plan.trajectory.calls.len());
        for (index, call) in plan.trajectory.calls.iter().enumerate() {
            let before = all.last();
            // who has finished a picture does not begin again
            let turn = usize::from(
                before.is_some_and(|asks| asks.main.turn == 1) || engine.is_refiners(call.timestep),
            );
            let mut asks = Self::at((engine.by_turn(turn), turn), plan, (index, call))?;
            let main = &mut asks.main;
            if plan.shortcuts.deep_cache > 1 {
                let same = |asks: &Self| (asks.main.turn, &asks.main.texts) == (turn, &main.texts);
                main.variant.shallow = plan.shortcuts.is_shallow(index) && before.is_some_and(same);
                if !main.variant.shallow {
                    main.variant.taps.push(Tap::Deep);
                }
            }
            all.push(asks);
        }
        Ok(all)
    }

    fn at(
        (engine, turn): (&Engine, usize),
        plan: &Plan,
        (index, call): (usize, &Call),
    ) -> Result<Self> {
        let (guidance, steps) = (&plan.guidance, plan.trajectory.steps);
        let guided = plan.guided
            && guidance.acts_at(call.step, steps)
            && !plan.shortcuts.skips_negative(index, call);
        let regions = plan.regions.len().saturating_sub(1);
        let positive: Vec<Text> = std::iter::once(Text::Prompt)
            .chain((0..regions).map(Text::Region))
            .collect();
        let mut texts = Vec::new();
        if guided && plan.image_cfg_scale.is_some() {
            texts.push(Text::Unseen);
        }
        if guided {
            texts.push(Text::Negative);
        }
        texts.extend(&positive);
        if guided && matches!(guidance.rule, Rule::Perpendicular { .. }) {
            texts.push(Text::Empty);
        }
        let whole = Variant {
            free_u: guidance.free_u,
            ..Variant::default()
        };
        // a refiner is not steered
        let controls = plan.controls.iter();
        let acts = |calls: &Vec<bool>| turn == 0 && calls.get(index).is_some_and(|acts| *acts);
        let acting: Vec<bool> = controls.clone().map(|one| acts(&one.calls)).collect();
        let both: Vec<bool> = controls
            .zip(&acting)
            .map(|(one, acts)| *acts && !one.acting.one_sided)
            .collect();
        let ask = |texts: &[Text], variant| Ask {
            turn,
            texts: texts.to_vec(),
            variant,
            acting: match texts.iter().any(|text| text.is_positive()) {
                true => acting.clone(),
                false => both.clone(),
            },
        };
        let lacking = plan
            .skip_layers
            .as_ref()
            .filter(|slg| guided && turn == 0 && slg.acts_at(call.step, steps));
        let pag = guidance.perturbed.as_ref();
        let pag = pag.map(|pag| (pag, pag.at(call.timestep)));
        let sag = guidance.self_attention.is_some();
        let against = match guided {
            true => &[Text::Negative],
            false => positive.as_slice(),
        };
        let tapped = Variant {
            taps: if sag { vec![Tap::Mass] } else { Vec::new() },
            ..whole.clone()
        };
        let (mut main, mut apart) = (ask(&texts, tapped), None);
        if guided && acting != both {
            let (seen, unseen): (Vec<_>, Vec<_>) = texts.iter().partition(|t| t.is_positive());
            main.texts = seen;
            apart = Some(ask(&unseen, whole.clone()));
        }
        Ok(Self {
            main,
            apart,
            lacking: lacking.map(|slg| {
                let variant = Variant {
                    skipped: slg.layers.clone(),
                    ..whole.clone()
                };
                ask(&positive, variant)
            }),
            perturbed: match pag.filter(|(_, scale)| *scale != 0.0) {
                Some((pag, scale)) => {
                    let names = engine.networks().self_attentions();
                    let variant = Variant {
                        identities: resolve(&pag.layers, &names)?,
                        ..whole.clone()
                    };
                    Some((ask(&positive, variant), scale))
                }
                None => None,
            },
            degraded: sag.then(|| ask(against, whole)),
        })
    }
}
