//! Flags of LoRAs and textual inversions.

use clap::Args;

/// How strict LoRAs are taken, and block by block: of `generate` and `convert`.
#[derive(Debug, Clone, Default, Args)]
pub struct LoraArgs {
    /// A LoRA of which anything has no place in the model is an error, not a warning
    #[arg(long, help_heading = "LoRA")]
    pub strict: bool,
    /// Weights of a --lora block by block, as sd-webui-lora-block-weight has them: INS, IND, INALL, MIDD, OUTD, OUTS, OUTALL, ALL, ALL0.5, NONE, or
    /// 12, 17, 20, 26 or (FLUX) 61 numbers; the first for the first --lora, and so on
    #[arg(
        long,
        value_name = "PRESET_OR_F,F,…",
        allow_hyphen_values = true,
        help_heading = "LoRA"
    )]
    pub lora_block_weights: Vec<String>,
}

/// Textual inversions of `generate`.
#[derive(Debug, Clone, Default, Args)]
pub struct EmbeddingArgs {
    /// A textual inversion, a file or a name in the models folders, and what prompts call it; may be repeated. Without a NAME it is the file's stem,
    /// or diffusers' token in it. Those in the folders are found by their names in the prompts
    #[arg(
        long,
        value_name = "FILE_OR_NAME[:NAME]",
        help_heading = "Textual inversion"
    )]
    pub embedding: Vec<String>,
}
