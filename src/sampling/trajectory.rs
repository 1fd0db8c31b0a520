//! A sampling run, compiled before it starts: network calls with linear combinations of a few registers between them.

use std::ops::{Add, Mul, Sub};

/// A tensor-valued variable of a run, shaped like the latents.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Register {
    /// The latents: initial noise times [`Trajectory::init_noise_sigma`] at the start, the result at the end.
    Sample,
    /// What the last network call saw.
    ModelInput,
    /// The (guided) prediction of the last network call.
    ModelOutput,
    /// A value kept for later.
    Saved(usize),
}

/// Σ coefficient · register.
pub type Combo = Vec<(Register, f64)>;

/// One assignment; everything is read before the target is written.
#[derive(Debug, Clone, PartialEq)]
pub enum Assign {
    /// `to = Σ terms + noise · fresh standard normal draw` of each image's own generator. A draw is made whenever `noise` is given,
    /// also for a factor of zero, because the order of draws is part of what a seed means.
    Linear {
        /// The target.
        to: Register,
        /// What is summed.
        terms: Combo,
        /// The factor of the draw, if there is one.
        noise: Option<f64>,
    },
    /// Limits a register to `low ..= high`.
    Clamp {
        /// The register.
        register: Register,
        /// Lower limit.
        low: f64,
        /// Upper limit.
        high: f64,
    },
}

/// One call of the network and what follows it.
#[derive(Debug, Clone, PartialEq)]
pub struct Call {
    /// What the network is told, 0 to 999, or 1000·σ of a flow; may be fractional.
    pub timestep: f64,
    /// The noise level, for display.
    pub sigma: f64,
    /// The step, as users count, that this call belongs to.
    pub step: usize,
    /// What the network sees.
    pub input: Combo,
    /// What is computed from its prediction, in order.
    pub then: Vec<Assign>,
}

/// A compiled run.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Trajectory {
    /// The initial noise is multiplied by this.
    pub init_noise_sigma: f64,
    /// The calls, in order.
    pub calls: Vec<Call>,
    /// How many [`Register::Saved`] there are.
    pub registers: usize,
    /// Steps as users count.
    pub steps: usize,
    /// The noise levels passed through, the final one included; empty for solvers that think in timesteps.
    pub sigmas: Vec<f64>,
}

impl Trajectory {
    /// The timestep of every call, in order.
    pub fn timesteps(&self) -> impl Iterator<Item = f64> + '_ {
        self.calls.iter().map(|call| call.timestep)
    }

    /// Whether every coefficient is a number: a schedule that visits a level twice makes some that are not.
    pub(super) fn is_finite(&self) -> bool {
        let finite = |terms: &Combo| terms.iter().all(|(_, c)| c.is_finite());
        self.init_noise_sigma.is_finite()
            && self.calls.iter().all(|call| {
                call.timestep.is_finite()
                    && finite(&call.input)
                    && call.then.iter().all(|assign| match assign {
                        Assign::Linear { terms, noise, .. } => {
                            finite(terms) && noise.is_none_or(f64::is_finite)
                        }
                        Assign::Clamp { low, high, .. } => low <= high,
                    })
            })
    }

    /// Executes the run on plain slices: the reference for every other executor.
    pub fn run(
        &self,
        noise: &mut dyn FnMut() -> Vec<f32>,
        model: &mut dyn FnMut(&[f32], f64) -> Vec<f32>,
    ) -> Vec<f32> {
        let init: Vec<f64> = noise()
            .iter()
            .map(|&x| f64::from(x) * self.init_noise_sigma)
            .collect();
        let n = init.len();
        let mut state = vec![vec![0f64; n]; 3 + self.registers];
        state[0] = init;
        let index = |register| match register {
            Register::Sample => 0,
            Register::ModelInput => 1,
            Register::ModelOutput => 2,
            Register::Saved(i) => 3 + i,
        };
        let combine = |state: &[Vec<f64>], terms: &Combo| -> Vec<f64> {
            (0..n)
                .map(|k| terms.iter().map(|&(r, c)| c * state[index(r)][k]).sum())
                .collect()
        };
        for call in &self.calls {
            state[1] = combine(&state, &call.input);
            let seen: Vec<f32> = state[1].iter().map(|&x| x as f32).collect();
            state[2] = model(&seen, call.timestep)
                .iter()
                .map(|&x| f64::from(x))
                .collect();
            for assign in &call.then {
                match assign {
                    Assign::Linear {
                        to,
                        terms,
                        noise: fresh,
                    } => {
                        let mut value = combine(&state, terms);
                        if let Some(factor) = fresh {
                            for (value, drawn) in value.iter_mut().zip(noise()) {
                                *value += factor * f64::from(drawn);
                            }
                        }
                        state[index(*to)] = value;
                    }
                    Assign::Clamp {
                        register,
                        low,
                        high,
                    } => {
                        for value in &mut state[index(*register)] {
                            *value = value.clamp(*low, *high);
                        }
                    }
                }
            }
        }
        state[0].iter().map(|&x| x as f32).collect()
    }
}

/// A linear combination under construction: solvers write their formulas with it.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Linear(Combo);

/// The latents.
pub(super) fn sample() -> Linear {
    Linear::of(Register::Sample)
}

/// The network's prediction.
pub(super) fn output() -> Linear {
    Linear::of(Register::ModelOutput)
}

/// A kept value.
pub(super) fn saved(index: usize) -> Linear {
    Linear::of(Register::Saved(index))
}

impl Linear {
    fn of(register: Register) -> Self {
        Self(vec![(register, 1.0)])
    }

    /// The terms that count.
    pub(super) fn combo(self) -> Combo {
        self.0.into_iter().filter(|&(_, c)| c != 0.0).collect()
    }

    /// `to = self`.
    pub(super) fn into(self, to: Register) -> Assign {
        Assign::Linear {
            to,
            terms: self.combo(),
            noise: None,
        }
    }

    /// `to = self + factor · noise`.
    pub(super) fn into_with_noise(self, to: Register, factor: f64) -> Assign {
        Assign::Linear {
            to,
            terms: self.combo(),
            noise: Some(factor),
        }
    }
}

impl Add for Linear {
    type Output = Self;

    fn add(mut self, other: Self) -> Self {
        for (register, coefficient) in other.0 {
            match self.0.iter_mut().find(|(r, _)| *r == register) {
                Some((_, c)) => *c += coefficient,
                None => self.0.push((register, coefficient)),
            }
        }
        self
    }
}

impl Mul<f64> for Linear {
    type Output = Self;

    fn mul(mut self, factor: f64) -> Self {
        for (_, coefficient) in &mut self.0 {
            *coefficient *= factor;
        }
        self
    }
}

impl Sub for Linear {
    type Output = Self;

    fn sub(self, other: Self) -> Self {
        self + other * -1.0
    }
}
