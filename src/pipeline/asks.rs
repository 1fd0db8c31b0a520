//! What the networks are asked at each call of a run, known before it.

use sd_models::variant::{Reuse, Tap, Variant};

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
    /// What else a network is told goes with the negative prompt: T-GATE behind guidance.
    pub(super) as_negative: bool,
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

    fn all_mut(&mut self) -> impl Iterator<Item = &mut Ask> {
        let perturbed = self.perturbed.iter_mut().map(|(ask, _)| ask);
        let others = self.apart.iter_mut().chain(&mut self.lacking);
        let others = others.chain(perturbed).chain(&mut self.degraded);
        std::iter::once(&mut self.main).chain(others)
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
        let calls = &plan.trajectory.calls;
        let mut all: Vec<Self> = Vec::with_capacity(calls.len());
        for (index, call) in calls.iter().enumerate() {
            let before = all.last();
            // who has finished a picture does not begin again
            let turn = usize::from(
                before.is_some_and(|asks| asks.main.turn == 1) || engine.is_refiners(call.timestep),
            );
            // a refiner finishes without a gate
            let gated = turn == 0 && plan.shortcuts.is_gated(calls, index);
            let mut asks = Self::at((engine.by_turn(turn), turn), plan, (index, call, gated))?;
            let main = &mut asks.main;
            if plan.shortcuts.deep_cache > 1 {
                let same = |asks: &Self| (asks.main.turn, &asks.main.texts) == (turn, &main.texts);
                main.variant.shallow = plan.shortcuts.is_shallow(index) && before.is_some_and(same);
                if !main.variant.shallow {
                    main.variant.taps.push(Tap::Deep);
                }
            }
            if let (Some(gate), 0) = (plan.shortcuts.gate, turn) {
                let step = call.step - calls.first().map_or(0, |first| first.step.min(call.step));
                main.reuse(&all, gated, gate.own_at(step));
            }
            all.push(asks);
        }
        keep_what_is_taken(&mut all);
        Ok(all)
    }

    fn at(
        (engine, turn): (&Engine, usize),
        plan: &Plan,
        (index, call, gated): (usize, &Call, bool),
    ) -> Result<Self> {
        let (guidance, steps) = (&plan.guidance, plan.trajectory.steps);
        let guided = plan.guided
            && !gated
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
            merging: plan.shortcuts.merging.filter(|merging| merging.ratio > 0.0),
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
            as_negative: false,
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
        let mut asks = Self {
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
        };
        asks.all_mut().for_each(Ask::settle_merging);
        Ok(asks)
    }
}

impl Ask {
    /// Lets attentions keep or take what they see as a gate has it, behind what was asked `before`.
    fn reuse(&mut self, before: &[Asks], gated: bool, own: Reuse) {
        let mains = || before.iter().rev().map(|asks| &asks.main);
        if gated {
            let open = mains().find(|ask| ask.variant.cross != Reuse::Take);
            self.as_negative = open.is_some_and(|open| open.texts.contains(&Text::Negative));
        }
        self.variant.cross = match gated {
            true => Reuse::Take,
            false => Reuse::Keep,
        };
        let last = mains().find(|ask| ask.variant.own == Reuse::Keep);
        let fits = last.is_some_and(|last| {
            last.texts == self.texts || (gated && last.variant.cross != Reuse::Take)
        });
        self.variant.own = match own {
            Reuse::Take if !fits => Reuse::Keep,
            own => own,
        };
    }

    /// An odd number of texts merges by no choice, as in tomesd: a batch of it need not hold both of guidance's.
    fn settle_merging(&mut self) {
        if let Some(merging) = &mut self.variant.merging {
            merging.random &= self.texts.len().is_multiple_of(2);
        }
    }
}

/// What the next call does not take is not kept.
fn keep_what_is_taken(all: &mut [Asks]) {
    let mut next = (Reuse::Nothing, Reuse::Nothing);
    for asks in all.iter_mut().rev() {
        let Variant { cross, own, .. } = &mut asks.main.variant;
        for (one, next) in [(&mut *cross, next.0), (&mut *own, next.1)] {
            if *one == Reuse::Keep && next != Reuse::Take {
                *one = Reuse::Nothing;
            }
        }
        next = (*cross, *own);
    }
}
