//! What stays of a picture while the rest is painted anew: latents that are put back at every call.

use candle_core::Tensor;

use crate::error::Result;
use crate::sampling::Call;

/// When known latents are put back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Blend {
    /// Behind every call, with the noise of the level that comes next (diffusers' inpainting pipelines).
    AfterStep,
    /// Into what the call says of the clean latents (A1111).
    Denoised,
    /// Without noise into what the call sees (A1111's DDIM, PLMS and UniPC).
    Seen,
    /// With noise into what the call sees, and into what it says of the clean latents (ComfyUI).
    BeforeAndDenoised,
}

/// What stays of a batch's pictures.
pub(super) struct Known {
    /// The picture's latents `[b, c, h, w]`.
    pub(super) latents: Tensor,
    /// The noise that the run began with, `[b, c, h, w]`.
    pub(super) noise: Tensor,
    /// 1 where latents are painted anew, `[1, 1, h, w]`.
    pub(super) mask: Tensor,
    /// When they are put back.
    pub(super) blend: Blend,
    /// Greys of the mask are painted from the noise level on that they name.
    pub(super) differential: bool,
}

impl Known {
    /// `painted` where the mask is 1 and `kept` where it is 0.
    fn mix(mask: &Tensor, painted: &Tensor, kept: &Tensor) -> Result<Tensor> {
        let rest = mask.affine(-1.0, 1.0)?;
        Ok((painted.broadcast_mul(mask)? + kept.broadcast_mul(&rest)?)?)
    }

    /// The picture's latents with noise.
    fn noised(&self, (latents, noise): (f64, f64)) -> Result<Tensor> {
        Ok(((&self.latents * latents)? + (&self.noise * noise)?)?)
    }

    /// The mask at a call; `progress` is 1 where the most noise is and 0 where none is left.
    fn mask_at(&self, progress: f64) -> Result<Tensor> {
        if !self.differential {
            return Ok(self.mask.clone());
        }
        let threshold = self.mask.zeros_like()?.affine(1.0, progress)?;
        let painted = self.mask.ge(&threshold)?;
        Ok(painted.to_dtype(self.mask.dtype())?)
    }

    /// What the network is to see in the place of `input`.
    pub(super) fn before(&self, input: &Tensor, call: &Call, progress: f64) -> Result<Tensor> {
        let known = match self.blend {
            Blend::AfterStep | Blend::Denoised => return Ok(input.clone()),
            Blend::Seen => self.latents.clone(),
            Blend::BeforeAndDenoised => (self.noised(call.now)? * call.scale)?,
        };
        Self::mix(&self.mask_at(progress)?, input, &known)
    }

    /// The prediction by which the sampler, which has `input`, arrives at clean latents of which the known ones are the picture's; `output` is
    /// what the network said of `seen`.
    pub(super) fn after_call(
        &self,
        (input, seen): (&Tensor, &Tensor),
        output: Tensor,
        call: &Call,
        progress: f64,
    ) -> Result<Tensor> {
        if matches!(self.blend, Blend::AfterStep | Blend::Seen) {
            return Ok(output);
        }
        let (of_input, of_output) = call.denoised;
        let clean = ((seen * of_input)? + (&output * of_output)?)?;
        let clean = Self::mix(&self.mask_at(progress)?, &clean, &self.latents)?;
        if of_output == 0.0 {
            // no noise is left: the prediction has no say
            return Ok(output);
        }
        Ok(((clean - (input * of_input)?)? * (1.0 / of_output))?)
    }

    /// What `sample` becomes behind a call.
    pub(super) fn after_step(&self, sample: &Tensor, call: &Call, progress: f64) -> Result<Tensor> {
        if self.blend != Blend::AfterStep {
            return Ok(sample.clone());
        }
        Self::mix(&self.mask_at(progress)?, sample, &self.noised(call.next)?)
    }

    /// What the last latents become: web UIs put the picture's back once more.
    pub(super) fn at_end(&self, sample: &Tensor) -> Result<Tensor> {
        match self.blend {
            Blend::AfterStep => Ok(sample.clone()),
            Blend::Denoised | Blend::Seen | Blend::BeforeAndDenoised => {
                Self::mix(&self.mask, sample, &self.latents)
            }
        }
    }
}
