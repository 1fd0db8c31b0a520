//! The loop: executes a trajectory's linear combinations on latents and asks the network in between.

use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor};

use super::event::{Event, Listener, send};
use super::known::Known;
use super::preview::Previewer;
use crate::error::{Error, Result};
use crate::sampling::{
    Assign, Brownian, BrownianTree, Call, Combo, Draw, Generator, Register, Threshold, Trajectory,
};

/// The registers of a run, all `[b, c, h, w]` in f32.
struct Registers {
    sample: Tensor,
    model_input: Tensor,
    model_output: Tensor,
    saved: Vec<Option<Tensor>>,
}

impl Registers {
    fn get(&self, register: Register) -> Result<&Tensor> {
        match register {
            Register::Sample => Ok(&self.sample),
            Register::ModelInput => Ok(&self.model_input),
            Register::ModelOutput => Ok(&self.model_output),
            Register::Saved(index) => {
                self.saved
                    .get(index)
                    .and_then(Option::as_ref)
                    .ok_or_else(|| {
                        Error::Numeric(format!(
                            "sampler register {index} is read before it is written"
                        ))
                    })
            }
        }
    }

    fn set(&mut self, register: Register, value: Tensor) {
        match register {
            Register::Sample => self.sample = value,
            Register::ModelInput => self.model_input = value,
            Register::ModelOutput => self.model_output = value,
            Register::Saved(index) => {
                if self.saved.len() <= index {
                    self.saved.resize(index + 1, None);
                }
                self.saved[index] = Some(value);
            }
        }
    }

    /// Σ coefficient · register; zero without terms.
    fn combine(&self, terms: &Combo) -> Result<Tensor> {
        let mut sum: Option<Tensor> = None;
        for &(register, coefficient) in terms {
            let term = self.get(register)?;
            let term = if coefficient == 1.0 {
                term.clone()
            } else {
                (term * coefficient)?
            };
            sum = Some(match sum {
                Some(sum) => (sum + term)?,
                None => term,
            });
        }
        match sum {
            Some(sum) => Ok(sum),
            None => Ok(self.sample.zeros_like()?),
        }
    }
}

/// The initial noise and every later draw of a batch: one generator an image, so that an image does not depend on its neighbours.
pub(super) struct BatchNoise {
    generators: Vec<Generator>,
    /// Of runs whose noise comes from Brownian motions; of the seeds of the generators.
    trees: Vec<BrownianTree>,
    /// `[c, h, w]` of one image.
    shape: [usize; 3],
    device: Device,
}

impl BatchNoise {
    pub(super) fn new(generators: Vec<Generator>, shape: [usize; 3], device: &Device) -> Self {
        Self {
            generators,
            trees: Vec::new(),
            shape,
            device: device.clone(),
        }
    }

    /// Pictures of the batch.
    pub(super) fn pictures(&self) -> usize {
        self.generators.len()
    }

    /// The seed of each picture.
    pub(super) fn seeds(&self) -> Vec<u64> {
        self.generators.iter().map(Generator::seed).collect()
    }

    /// The Brownian motion of each image, for a run that draws from them.
    fn plant(&mut self, brownian: Option<Brownian>) {
        let n = self.shape.iter().product();
        let tree = |brownian: Brownian, generator: &Generator| {
            let generator = match brownian.seed {
                Some(seed) => &generator.reseeded(seed),
                None => generator,
            };
            BrownianTree::new(generator, (brownian.low, brownian.high), n)
        };
        self.trees = brownian.map_or_else(Vec::new, |brownian| {
            let generators = self.generators.iter();
            generators.map(|g| tree(brownian, g)).collect()
        });
    }

    /// Standard normal numbers `[b, c, h, w]`.
    pub(super) fn draw(&mut self) -> Result<Tensor> {
        self.draw_of(self.shape)
    }

    /// The same of another shape.
    pub(super) fn draw_of(&mut self, shape: [usize; 3]) -> Result<Tensor> {
        let n = shape.iter().product();
        let values = self.generators.iter_mut().flat_map(|g| g.normal(n));
        let values = values.collect();
        self.tensor(values, shape)
    }

    /// The noise of a draw, from each image's motion if it lies between two levels.
    fn drawn(&mut self, draw: &Draw) -> Result<Tensor> {
        match draw.between {
            Some((from, to)) if !self.trees.is_empty() => {
                let values = self.trees.iter().flat_map(|tree| tree.noise(from, to));
                self.tensor(values.collect(), self.shape)
            }
            _ => self.draw(),
        }
    }

    fn tensor(&self, values: Vec<f32>, [c, h, w]: [usize; 3]) -> Result<Tensor> {
        let shape = (self.generators.len(), c, h, w);
        Ok(Tensor::from_vec(values, shape, &self.device)?)
    }
}

/// A network with guidance: model input and what is asked → prediction, both `[b, c, h, w]`.
pub(super) type Model<'a> = dyn FnMut(&Tensor, &Call) -> Result<Tensor> + 'a;

/// What a run is.
pub(super) struct Run<'a> {
    /// Its calls.
    pub(super) trajectory: &'a Trajectory,
    /// What stays of a picture.
    pub(super) known: Option<&'a Known>,
    /// Steps of earlier batches, and of all.
    pub(super) progress: (usize, usize),
    /// Who makes previews.
    pub(super) previewer: Option<&'a Previewer<'a>>,
}

impl Run<'_> {
    /// Goes from the first latents to the last, and gives the seconds of every network call.
    pub(super) fn go(
        &self,
        sample: Tensor,
        noise: &mut BatchNoise,
        model: &mut Model<'_>,
        listener: &mut Listener<'_>,
    ) -> Result<(Tensor, Vec<Duration>)> {
        let (done, total) = self.progress;
        noise.plant(self.trajectory.brownian);
        let mut registers = Registers {
            model_input: sample.clone(),
            model_output: sample.clone(),
            sample,
            saved: vec![None; self.trajectory.registers],
        };
        let calls = &self.trajectory.calls;
        let mut times = Vec::with_capacity(calls.len());
        for (index, call) in calls.iter().enumerate() {
            let start = Instant::now();
            let left = self.left(call);
            registers.model_input = registers.combine(&call.input)?;
            registers.model_output = self.predict(&registers.model_input, call, left, model)?;
            step(&mut registers, call, noise)?;
            if let Some(known) = self.known {
                registers.sample = known.after_step(&registers.sample, call, left)?;
            }
            check_finite(&registers.sample, index + 1)?;
            times.push(start.elapsed());
            let next = calls.get(index + 1);
            if next.is_none_or(|next| next.step != call.step) {
                let done = done + call.step + 1;
                send(listener, Event::Step { done, total })?;
                self.preview(&registers, call, listener)?;
            }
        }
        let sample = match self.known {
            Some(known) => known.at_end(&registers.sample)?,
            None => registers.sample,
        };
        Ok((sample, times))
    }

    /// Sends what the pictures are going to be, by what the last call said.
    fn preview(
        &self,
        registers: &Registers,
        call: &Call,
        listener: &mut Listener<'_>,
    ) -> Result<()> {
        let Some(previewer) = self.previewer.filter(|p| p.is_due(call.step + 1)) else {
            return Ok(());
        };
        let (of_input, of_output) = call.denoised;
        let clean =
            ((&registers.model_input * of_input)? + (&registers.model_output * of_output)?)?;
        match previewer.image(&clean)? {
            Some(image) => send(listener, Event::Preview(image)),
            None => Ok(()),
        }
    }

    /// The prediction, by which what is known of the picture stays.
    fn predict(
        &self,
        input: &Tensor,
        call: &Call,
        left: f64,
        model: &mut Model<'_>,
    ) -> Result<Tensor> {
        let Some(known) = self.known else {
            return model(input, call);
        };
        let seen = known.before(input, call, left)?;
        let output = model(&seen, call)?;
        known.after_call((input, &seen), output, call, left)
    }

    /// How much of the run's noise is left at a call, by its timestep: 1 at the first, 0 at none.
    fn left(&self, call: &Call) -> f64 {
        let first = self.trajectory.calls.first().map_or(0.0, |c| c.timestep);
        if first > 0.0 {
            (call.timestep / first).clamp(0.0, 1.0)
        } else {
            0.0
        }
    }
}

fn step(registers: &mut Registers, call: &Call, noise: &mut BatchNoise) -> Result<()> {
    for assign in &call.then {
        match assign {
            Assign::Linear {
                to,
                terms,
                noise: fresh,
            } => {
                let mut value = registers.combine(terms)?;
                if let Some(draw) = fresh {
                    let drawn = noise.drawn(draw)?;
                    if draw.factor != 0.0 {
                        value = (value + (drawn * draw.factor)?)?;
                    }
                }
                registers.set(*to, value);
            }
            Assign::Clamp {
                register,
                low,
                high,
            } => {
                let value = registers.get(*register)?.clamp(*low, *high)?;
                registers.set(*register, value);
            }
            Assign::Limit { register, to } => {
                let value = limited(registers.get(*register)?, to)?;
                registers.set(*register, value);
            }
        }
    }
    Ok(())
}

/// Each picture of `x [n, …]` limited by what is in it.
fn limited(x: &Tensor, to: &Threshold) -> Result<Tensor> {
    let values: Vec<f32> = x.flatten_all()?.to_vec1()?;
    let mut values: Vec<f64> = values.into_iter().map(f64::from).collect();
    let each = values.len() / x.dim(0)?.max(1);
    for picture in values.chunks_mut(each.max(1)) {
        to.limit(picture);
    }
    let values: Vec<f32> = values.into_iter().map(|x| x as f32).collect();
    Ok(Tensor::from_vec(values, x.shape(), x.device())?)
}

fn check_finite(latents: &Tensor, call: usize) -> Result<()> {
    // the sum is finite exactly when every element is: latents are far from overflow
    let sum = latents
        .to_dtype(DType::F32)?
        .abs()?
        .sum_all()?
        .to_scalar::<f32>()?;
    if sum.is_finite() {
        return Ok(());
    }
    Err(Error::Numeric(format!(
        "the latents are not numbers any more after network call {call}; the checkpoint may be damaged, or the guidance far too high"
    )))
}
