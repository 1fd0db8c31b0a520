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

/// Last parts of the names of what stands beside 8-bit weights: the file's mark, scales, ComfyUI's notes.
const BESIDE_EIGHT_BITS: [&str; 6] = [
    "scaled_fp8",
    "scale_weight",
    "weight_scale",
    "scale_input",
    "input_scale",
    "comfy_quant",
];

/// What the tensor `name` of a single file is, if it is known and no network needs it.
pub fn leftover(name: &str) -> Option<&'static str> {
    let last = name.rsplit('.').next().unwrap_or(name);
    if BESIDE_EIGHT_BITS.contains(&last) {
        return Some("tensors that only say how 8-bit weights are kept");
    }
    KNOWN
        .iter()
        .find(|(starts, _)| starts.iter().any(|start| name.starts_with(start)))
        .map(|(_, what)| *what)
}
