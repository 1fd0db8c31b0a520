//! Where models lie: our own folder, A1111's tree, the folders that ComfyUI's `extra_model_paths.yaml` names.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use super::{Library, extra};
use crate::error::{Error, Result};

/// What a model is for, as far as the folder that it lies in tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// A whole model, or its network.
    Checkpoint,
    /// An autoencoder.
    Vae,
    /// A LoRA of any kind.
    Lora,
    /// A ControlNet.
    ControlNet,
    /// A textual inversion.
    Embedding,
    /// An upscaler.
    Upscaler,
    /// A text encoder.
    Text,
}

impl Kind {
    /// For tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Checkpoint => "checkpoint",
            Self::Vae => "vae",
            Self::Lora => "lora",
            Self::ControlNet => "controlnet",
            Self::Embedding => "embedding",
            Self::Upscaler => "upscaler",
            Self::Text => "text",
        }
    }

    /// The kind that A1111 or ComfyUI keeps in a folder of this name.
    pub(super) fn of_folder(name: &str) -> Option<Self> {
        Some(match name.to_ascii_lowercase().as_str() {
            "checkpoints" | "stable-diffusion" | "diffusion_models" | "unet" => Self::Checkpoint,
            "vae" | "vae_approx" => Self::Vae,
            "lora" | "loras" | "lycoris" => Self::Lora,
            "controlnet" | "t2i_adapter" => Self::ControlNet,
            "embeddings" => Self::Embedding,
            "esrgan" | "realesrgan" | "swinir" | "upscale_models" => Self::Upscaler,
            "text_encoders" | "clip" => Self::Text,
            _ => return None,
        })
    }
}

/// A folder with models.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The folder, which need not exist.
    pub path: PathBuf,
    /// What lies in it; none when the folders within tell.
    pub kind: Option<Kind>,
}

/// What the command line says of folders.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// The models folder, in place of the platform's.
    pub models: Option<PathBuf>,
    /// The folder of A1111's program.
    pub a1111: Option<PathBuf>,
    /// ComfyUI's `extra_model_paths.yaml`.
    pub extra: Option<PathBuf>,
}

/// Where A1111 keeps what.
const A1111: [(&str, Kind); 10] = [
    ("models/Stable-diffusion", Kind::Checkpoint),
    ("models/VAE", Kind::Vae),
    ("models/Lora", Kind::Lora),
    ("models/LyCORIS", Kind::Lora),
    ("models/ControlNet", Kind::ControlNet),
    ("extensions/sd-webui-controlnet/models", Kind::ControlNet),
    ("models/ESRGAN", Kind::Upscaler),
    ("models/RealESRGAN", Kind::Upscaler),
    ("models/SwinIR", Kind::Upscaler),
    ("embeddings", Kind::Embedding),
];

/// The folders, by options and environment.
pub(super) fn library(
    options: &Options,
    lookup: &dyn Fn(&str) -> Option<OsString>,
) -> Result<Library> {
    let root = match options.models.clone().or_else(|| data_folder(lookup)) {
        Some(root) => root,
        None => PathBuf::from("models"),
    };
    let mut places = vec![Place {
        path: root.clone(),
        kind: None,
    }];
    if let Some(base) = &options.a1111 {
        if !base.is_dir() {
            return Err(Error::NotFound {
                what: base.display().to_string(),
                hint: "--a1111-dir (SD_RS_A1111_DIR) names the folder of A1111's program, in which there are models/ and embeddings/; there is no such folder"
                    .to_owned(),
            });
        }
        places.extend(A1111.iter().map(|(path, kind)| Place {
            path: base.join(path),
            kind: Some(*kind),
        }));
    }
    let own = root.join("extra_model_paths.yaml");
    let file = options
        .extra
        .clone()
        .or_else(|| own.is_file().then_some(own));
    if let Some(file) = file {
        places.extend(extra::places(&file, lookup)?);
    }
    Ok(Library {
        root,
        places,
        hashes: cache_folder(lookup).map(|folder| folder.join("hashes.json")),
    })
}

/// Where programs of this platform keep their data, and in it the models.
fn data_folder(lookup: &dyn Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    let path = |name: &str| {
        lookup(name)
            .filter(|v| Path::new(v).is_absolute())
            .map(PathBuf::from)
    };
    let base = if cfg!(windows) {
        path("LOCALAPPDATA")?
    } else if cfg!(target_os = "macos") {
        path("HOME")?.join("Library/Application Support")
    } else {
        path("XDG_DATA_HOME").or_else(|| Some(path("HOME")?.join(".local/share")))?
    };
    Some(base.join("sd-rs").join("models"))
}

/// Where programs of this platform keep what they can make again.
fn cache_folder(lookup: &dyn Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    let path = |name: &str| {
        lookup(name)
            .filter(|v| Path::new(v).is_absolute())
            .map(PathBuf::from)
    };
    let base = if cfg!(windows) {
        path("LOCALAPPDATA")?
    } else if cfg!(target_os = "macos") {
        path("HOME")?.join("Library/Caches")
    } else {
        path("XDG_CACHE_HOME").or_else(|| Some(path("HOME")?.join(".cache")))?
    };
    Some(base.join("sd-rs"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    #[cfg(target_os = "linux")]
    fn the_models_folder_is_the_platforms_unless_named() {
        let with = |models: Option<&str>, variables: &[(&str, &str)]| {
            let lookup = |name: &str| {
                variables
                    .iter()
                    .find(|(key, _)| *key == name)
                    .map(|(_, v)| OsString::from(v))
            };
            let options = Options {
                models: models.map(PathBuf::from),
                ..Options::default()
            };
            library(&options, &lookup).unwrap().root
        };
        let home = ("HOME", "/h");
        assert_eq!(
            with(None, &[home]),
            Path::new("/h/.local/share/sd-rs/models")
        );
        assert_eq!(
            with(None, &[home, ("XDG_DATA_HOME", "/d")]),
            Path::new("/d/sd-rs/models")
        );
        assert_eq!(with(Some("/m"), &[home]), Path::new("/m"));
    }

    #[test]
    fn a1111s_tree_is_understood() {
        let folder = tempfile::tempdir().unwrap();
        let put = |name: &str| {
            let path = folder.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "x").unwrap();
        };
        for name in [
            "models/Stable-diffusion/sub/a.safetensors",
            "models/VAE/b.pt",
            "models/Lora/c.safetensors",
            "embeddings/d.pt",
            "models/Codeformer/e.pth",
        ] {
            put(name);
        }
        let options = Options {
            models: Some(folder.path().join("none")),
            a1111: Some(folder.path().to_owned()),
            ..Options::default()
        };
        let library = library(&options, &|_| None).unwrap();
        let found: Vec<(Kind, String)> = library
            .entries()
            .into_iter()
            .map(|e| (e.kind, e.name))
            .collect();
        let expected = [
            (Kind::Checkpoint, "a"),
            (Kind::Vae, "b"),
            (Kind::Lora, "c"),
            (Kind::Embedding, "d"),
        ];
        assert_eq!(found, expected.map(|(kind, name)| (kind, name.to_owned())));
        let wrong = Options {
            a1111: Some(folder.path().join("no")),
            ..Options::default()
        };
        assert!(
            super::library(&wrong, &|_| None)
                .unwrap_err()
                .to_string()
                .contains("--a1111-dir")
        );
    }
}
