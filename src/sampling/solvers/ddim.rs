//! DDIM: Song et al., "Denoising Diffusion Implicit Models", arXiv 2010.02502, equation 12 with η = 0 (diffusers `DDIMScheduler`).

use super::super::config::SchedulerConfig;
use super::super::prediction::estimates;
use super::super::schedule::NoiseSchedule;
use super::super::spacing;
use super::super::trajectory::{Assign, Register, Trajectory, output, sample, saved};
use super::plain_call;

/// ᾱ at a timestep that may lie before the first.
pub(super) fn alpha_bar(config: &SchedulerConfig, schedule: &NoiseSchedule, timestep: f64) -> f64 {
    if timestep < 0.0 {
        return if config.set_alpha_to_one {
            1.0
        } else {
            schedule.alphas_cumprod[0]
        };
    }
    schedule.alphas_cumprod[(timestep as usize).min(schedule.len() - 1)]
}

pub(in super::super) fn ddim(
    config: &SchedulerConfig,
    schedule: &NoiseSchedule,
    steps: usize,
) -> Trajectory {
    let stride = (config.num_train_timesteps / steps) as f64;
    let timesteps = spacing::timesteps(config, steps, true);
    let mut run = Trajectory {
        init_noise_sigma: 1.0,
        registers: 2,
        steps: timesteps.len(),
        ..Trajectory::default()
    };
    for (i, &t) in timesteps.iter().enumerate() {
        let now = alpha_bar(config, schedule, t);
        let next = alpha_bar(config, schedule, t - stride);
        let scales = (now.sqrt(), (1.0 - now).sqrt());
        let (x0, epsilon) = estimates(config.prediction, scales, &sample(), &output());
        let mut call = plain_call(i, t, ((1.0 - now) / now).sqrt());
        call.then.push(x0.into(Register::Saved(0)));
        call.then.push(epsilon.into(Register::Saved(1)));
        if config.clip_sample {
            let range = config.clip_sample_range;
            call.then.push(Assign::Clamp {
                register: Register::Saved(0),
                low: -range,
                high: range,
            });
        }
        let x = saved(0) * next.sqrt() + saved(1) * (1.0 - next).sqrt();
        call.then.push(x.into(Register::Sample));
        run.calls.push(call);
    }
    run
}
