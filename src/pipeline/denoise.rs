//! The loop: executes a trajectory's linear combinations on latents and asks the network in between.

use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor};

use super::event::{Event, Listener, send};
use crate::error::{Error, Result};
use crate::sampling::{Assign, Call, Combo, Generator, Register, Threshold, Trajectory};

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
    /// `[c, h, w]` of one image.
    shape: [usize; 3],
    device: Device,
}

impl BatchNoise {
    pub(super) fn new(generators: Vec<Generator>, shape: [usize; 3], device: &Device) -> Self {
        Self {
            generators,
            shape,
            device: device.clone(),
        }
    }

    /// Standard normal numbers `[b, c, h, w]`.
    pub(super) fn draw(&mut self) -> Result<Tensor> {
        let [c, h, w] = self.shape;
        let values: Vec<f32> = self
            .generators
            .iter_mut()
            .flat_map(|g| g.normal(c * h * w))
            .collect();
        Ok(Tensor::from_vec(
            values,
            (self.generators.len(), c, h, w),
            &self.device,
        )?)
    }
}

/// A network with guidance: model input and what is asked → prediction, both `[b, c, h, w]`.
pub(super) type Model<'a> = dyn FnMut(&Tensor, &Call) -> Result<Tensor> + 'a;

/// Runs `trajectory` and gives the latents and the seconds of every network call. `done` counts steps of earlier batches.
pub(super) fn run(
    trajectory: &Trajectory,
    noise: &mut BatchNoise,
    model: &mut Model<'_>,
    (done, total): (usize, usize),
    listener: &mut Listener<'_>,
) -> Result<(Tensor, Vec<Duration>)> {
    let sample = (noise.draw()? * trajectory.init_noise_sigma)?;
    let mut registers = Registers {
        model_input: sample.clone(),
        model_output: sample.clone(),
        sample,
        saved: vec![None; trajectory.registers],
    };
    let mut times = Vec::with_capacity(trajectory.calls.len());
    for (index, call) in trajectory.calls.iter().enumerate() {
        let start = Instant::now();
        registers.model_input = registers.combine(&call.input)?;
        registers.model_output = model(&registers.model_input, call)?;
        step(&mut registers, call, noise)?;
        check_finite(&registers.sample, index + 1)?;
        times.push(start.elapsed());
        let last_of_step = trajectory
            .calls
            .get(index + 1)
            .is_none_or(|next| next.step != call.step);
        if last_of_step {
            send(
                listener,
                Event::Step {
                    done: done + call.step + 1,
                    total,
                },
            )?;
        }
    }
    Ok((registers.sample, times))
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
                    let drawn = noise.draw()?;
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
