//! What tensors outside the networks are, where there is a word for it: training's state, averaged copies, the noise schedule.

/// Name beginnings and what such tensors are, in the plural.
const KNOWN: [(&[&str], &str); 5] = [
    (
        &["model_ema.", "first_stage_model.model_ema."],
        "tensors of an averaged copy (model_ema.*)",
    ),
    (
        &[
            "optimizer",
            "lr_schedulers",
            "loss.",
            "first_stage_model.loss.",
            "global_step",
            "logvar",
        ],
        "tensors of the training's state",
    ),
    (
        &[
            "alphas_",
            "betas",
            "sqrt_",
            "log_one_minus",
            "posterior_",
            "denoiser.sigmas",
        ],
        "tensors of the noise schedule, which is computed",
    ),
    (
        &[
            "cond_stage_model.logit_scale",
            "cond_stage_model.text_projection",
        ],
        "tensors of CLIP's comparison of texts with pictures",
    ),
    (
        &["v_pred", "ztsnr", "edm_mean", "edm_std", "edm_vpred."],
        "tensors that only say what the UNet predicts",
    ),
];

/// What the tensor `name` of a single file is, if it is known and no network needs it.
pub fn leftover(name: &str) -> Option<&'static str> {
    KNOWN
        .iter()
        .find(|(starts, _)| starts.iter().any(|start| name.starts_with(start)))
        .map(|(_, what)| *what)
}
