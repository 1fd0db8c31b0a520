//! Which files of a repository are needed: a pure function from their names. Nothing twice: one form and one precision of each network.

use std::collections::BTreeSet;

use super::name::RepoName;
use crate::checkpoint::printable;
use crate::error::{Error, Result};

/// The components of a diffusers folder that hold weights and are used.
const WEIGHTED: [&str; 6] = [
    "unet",
    "transformer",
    "vae",
    "text_encoder",
    "text_encoder_2",
    "text_encoder_3",
];
/// Those that hold none.
const PLAIN: [&str; 4] = ["scheduler", "tokenizer", "tokenizer_2", "tokenizer_3"];
/// Files beside the components.
const ROOT: [&str; 2] = ["model_index.json", "sd-rs.json"];
/// What weights are called, as `checkpoint/component.rs` looks for them.
const STEMS: [&str; 2] = ["diffusion_pytorch_model", "model"];
/// The variants that stand in for plain files that are not there, best first.
const STAND_INS: [&str; 2] = ["fp16", "bf16"];
/// How many candidates a sentence lists.
const SHOWN: usize = 12;

/// A file as the Hub lists it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Remote {
    /// Its path within the repository.
    pub path: String,
    /// Its bytes; none where a mirror does not say.
    pub size: Option<u64>,
    /// The name of its blob: a SHA-256 of 64 digits, or git's SHA-1 of 40.
    pub etag: Option<String>,
}

/// What is needed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// The files, by path.
    pub files: Vec<Remote>,
    /// The one model file, where the model is not the whole folder.
    pub single: Option<String>,
}

/// Chooses the files that the model needs. `variant` is a precision that is wanted, such as `fp16`.
///
/// # Errors
/// [`Error::NotFound`] with a sentence that lists the choices, when there is no such file, none that is read, or more than one.
pub fn plan(name: &RepoName, files: &[Remote], variant: Option<&str>) -> Result<Plan> {
    let chooser = Chooser {
        name,
        files,
        variant,
    };
    if let Some(file) = name.file() {
        return chooser.single(file);
    }
    let is_there = |path: &str| files.iter().any(|file| file.path == path);
    let has_network = |file: &Remote| {
        ["unet/", "transformer/"]
            .iter()
            .any(|folder| file.path.starts_with(folder))
    };
    if is_there("model_index.json") && files.iter().any(has_network) {
        chooser.folder()
    } else if is_there("config.json") && chooser.weights("")?.is_some() {
        chooser.component()
    } else {
        chooser.only()
    }
}

/// Whether these files of a diffusers folder are all that its `model_index.json` asks for, among the components that are used.
pub(super) fn is_complete(index: &serde_json::Value, paths: &[&str]) -> bool {
    let Some(index) = index.as_object() else {
        return false;
    };
    let named = index
        .iter()
        .filter(|(_, value)| value.get(1).is_some_and(serde_json::Value::is_string));
    named.map(|(name, _)| name.as_str()).all(|name| {
        let inside: Vec<&str> = paths
            .iter()
            .filter_map(|path| path.strip_prefix(name)?.strip_prefix('/'))
            .collect();
        if WEIGHTED.contains(&name) {
            has_weights(&inside)
        } else {
            !PLAIN.contains(&name) || !inside.is_empty()
        }
    })
}

/// Whether a component's files have weights in one piece, or as many shards as their names promise.
fn has_weights(names: &[&str]) -> bool {
    let shards: Vec<usize> = names.iter().filter_map(|name| shards_of(name)).collect();
    match shards.first() {
        Some(count) => shards.len() >= *count,
        None => names.iter().any(|name| name.ends_with(".safetensors")),
    }
}

/// Of `x-00001-of-00004.safetensors`: 4.
fn shards_of(name: &str) -> Option<usize> {
    let (_, rest) = name.strip_suffix(".safetensors")?.split_once("-of-")?;
    rest.get(..5)?.parse().ok()
}

struct Chooser<'a> {
    name: &'a RepoName,
    files: &'a [Remote],
    variant: Option<&'a str>,
}

impl<'a> Chooser<'a> {
    /// The file of that path, or the only one of that name.
    fn single(&self, wanted: &str) -> Result<Plan> {
        let mut found: Vec<&Remote> = self
            .files
            .iter()
            .filter(|file| file.path == wanted)
            .collect();
        if found.is_empty() {
            let named = |file: &&Remote| base(&file.path).eq_ignore_ascii_case(wanted);
            found = self.files.iter().filter(named).collect();
        }
        match found.as_slice() {
            [file] => Ok(single(file)),
            [] => Err(self.refuse(
                &format!("the repository has no file `{}`", printable(wanted)),
                &self.models(),
            )),
            several => Err(self.refuse(
                &format!("the repository has {} files of that name", several.len()),
                several,
            )),
        }
    }

    /// A repository of one file.
    fn only(&self) -> Result<Plan> {
        let all = self.models();
        let root: Vec<&Remote> = all
            .iter()
            .copied()
            .filter(|file| !file.path.contains('/'))
            .collect();
        let candidates = if root.is_empty() { all } else { root };
        match candidates.as_slice() {
            [file] => Ok(single(file)),
            [] => {
                let endings = [".ckpt", ".bin", ".pt", ".pth", ".msgpack", ".onnx", ".gguf"];
                let others: Vec<&Remote> = self
                    .files
                    .iter()
                    .filter(|f| endings.iter().any(|e| f.path.ends_with(e)))
                    .collect();
                let reason = match others.first() {
                    Some(file) => format!(
                        "its weights are only there as `{}` and the like, which are not read",
                        printable(&file.path)
                    ),
                    None => "it holds no model".to_owned(),
                };
                Err(Error::NotFound {
                    what: format!("a .safetensors file in {}", self.name),
                    hint: format!("{reason}; look for another repository of the same model"),
                })
            }
            several => Err(self.refuse(
                &format!("the repository has {} model files", several.len()),
                several,
            )),
        }
    }

    /// A diffusers folder.
    fn folder(&self) -> Result<Plan> {
        let mut files: Vec<Remote> = self
            .files
            .iter()
            .filter(|f| ROOT.contains(&f.path.as_str()))
            .cloned()
            .collect();
        let mut variant_seen = self.variant.is_none();
        for component in WEIGHTED {
            let folder = format!("{component}/");
            let inside: Vec<&Remote> = self.inside(&folder).collect();
            if inside.is_empty() {
                continue;
            }
            let Some((variant, weights)) = self.weights(&folder)? else {
                let other = inside.iter().find(|f| {
                    [".bin", ".msgpack", ".onnx", ".h5"]
                        .iter()
                        .any(|e| f.path.ends_with(e))
                });
                let other = other.map_or_else(String::new, |f| {
                    format!(" (only `{}` and the like)", printable(&f.path))
                });
                return Err(Error::NotFound {
                    what: format!("weights of the component `{component}` of {}", self.name),
                    hint: format!(
                        "the repository has no .safetensors file for it{other}; look for another repository of the same model"
                    ),
                });
            };
            variant_seen |= variant.is_some() && variant == self.variant;
            files.extend(weights.into_iter().cloned());
            files.extend(
                inside
                    .into_iter()
                    .filter(|f| is_config(base(&f.path)))
                    .cloned(),
            );
        }
        for component in PLAIN {
            files.extend(
                self.inside(&format!("{component}/"))
                    .filter(|f| is_config(base(&f.path)))
                    .cloned(),
            );
        }
        self.check_variant(variant_seen)?;
        Ok(sorted(files, None))
    }

    /// One component in the root: a VAE, a ControlNet.
    fn component(&self) -> Result<Plan> {
        let (variant, weights) = self.weights("")?.unwrap_or_default();
        self.check_variant(self.variant.is_none() || variant == self.variant)?;
        let single = match weights.as_slice() {
            [file] => Some(file.path.clone()),
            _ => None,
        };
        let config = self.files.iter().filter(|file| file.path == "config.json");
        Ok(sorted(
            weights.into_iter().chain(config).cloned().collect(),
            single,
        ))
    }

    fn check_variant(&self, seen: bool) -> Result<()> {
        if seen {
            return Ok(());
        }
        let mut variants: BTreeSet<&str> = BTreeSet::new();
        for file in self.files {
            let middle = base(&file.path)
                .strip_suffix(".safetensors")
                .and_then(|stem| stem.split_once('.'));
            variants.extend(middle.and_then(|(_, rest)| rest.split('-').next()));
        }
        let there: Vec<String> = variants.into_iter().map(printable).collect();
        Err(Error::NotFound {
            what: format!(
                "the variant `{}` in {}",
                printable(self.variant.unwrap_or("")),
                self.name
            ),
            hint: if there.is_empty() {
                "the repository has only plain files; leave --variant out".to_owned()
            } else {
                format!(
                    "the repository has {}; choose one, or leave --variant out",
                    there.join(", ")
                )
            },
        })
    }

    /// The weights of one component in the best precision that is there, with its name: in one piece, or an index and its shards.
    fn weights(&self, folder: &str) -> Result<Option<(Option<&'a str>, Vec<&'a Remote>)>> {
        let mut variants = vec![self.variant, None];
        variants.dedup();
        variants.extend(STAND_INS.map(Some));
        for variant in variants {
            for stem in STEMS {
                let found = self.stem(folder, stem, variant);
                if !found.is_empty() {
                    return Ok(Some((variant, found)));
                }
            }
        }
        Ok(None)
    }

    fn stem(&self, folder: &str, stem: &str, variant: Option<&str>) -> Vec<&'a Remote> {
        let dotted = variant.map_or_else(String::new, |variant| format!(".{variant}"));
        let whole = format!("{stem}{dotted}.safetensors");
        let index = format!("{stem}.safetensors.index{dotted}.json");
        let mut shards: Vec<&Remote> = Vec::new();
        for file in self.inside(folder) {
            let name = base(&file.path);
            if name == whole {
                return vec![file];
            }
            // both `x.fp16-00001-of-00002` and `x-00001-of-00002.fp16` are in use
            let numbers = name
                .strip_prefix(stem)
                .and_then(|rest| rest.strip_suffix(".safetensors"));
            let numbers = numbers.and_then(|rest| {
                if dotted.is_empty() {
                    Some(rest)
                } else {
                    rest.strip_prefix(&dotted).or(rest.strip_suffix(&dotted))
                }
            });
            let is_shard =
                numbers.is_some_and(|n| n.len() == 15 && n.starts_with('-') && n.contains("-of-"));
            if is_shard || name == index {
                shards.push(file);
            }
        }
        let has_index = shards.iter().any(|file| base(&file.path) == index);
        if has_index && shards.len() > 1 {
            shards
        } else {
            Vec::new()
        }
    }

    /// The files right in a folder (`unet/`, or nothing for the root).
    fn inside(&self, folder: &str) -> impl Iterator<Item = &'a Remote> + use<'a> {
        let folder = folder.to_owned();
        self.files.iter().filter(move |file| {
            file.path
                .strip_prefix(&folder)
                .is_some_and(|rest| !rest.contains('/'))
        })
    }

    fn models(&self) -> Vec<&'a Remote> {
        self.files
            .iter()
            .filter(|file| file.path.ends_with(".safetensors"))
            .collect()
    }

    /// A refusal that lists what could be meant.
    fn refuse(&self, reason: &str, candidates: &[&Remote]) -> Error {
        let shown: Vec<String> = candidates
            .iter()
            .take(SHOWN)
            .map(|file| match file.size {
                Some(size) => format!("{} ({})", printable(&file.path), super::human(size)),
                None => printable(&file.path),
            })
            .collect();
        let more = candidates.len().saturating_sub(SHOWN);
        let more = if more > 0 {
            format!(" and {more} more")
        } else {
            String::new()
        };
        let example = candidates
            .first()
            .map_or("file.safetensors", |file| file.path.as_str());
        let list = if shown.is_empty() {
            "it has no .safetensors file at all".to_owned()
        } else {
            format!(
                "choose one of {}{more} by appending :file, such as {}:{}",
                shown.join(", "),
                self.name.id(),
                printable(example)
            )
        };
        Error::NotFound {
            what: format!("one model file for {}", self.name),
            hint: format!("{reason}; {list}"),
        }
    }
}

fn single(file: &Remote) -> Plan {
    Plan {
        files: vec![file.clone()],
        single: Some(file.path.clone()),
    }
}

fn sorted(mut files: Vec<Remote>, single: Option<String>) -> Plan {
    files.sort_by(|a, b| a.path.cmp(&b.path));
    files.dedup_by(|a, b| a.path == b.path);
    Plan { files, single }
}

/// The name within its folder.
fn base(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

/// A config or a tokenizer's file; indexes of shards come with their shards.
fn is_config(name: &str) -> bool {
    let ending = [".json", ".txt", ".model"]
        .iter()
        .any(|ending| name.ends_with(ending));
    ending
        && !name.contains(".index.")
        && !name.starts_with("openvino")
        && !name.starts_with("flax")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn files(paths: &[&str]) -> Vec<Remote> {
        let remote = |path: &&str| Remote {
            path: (*path).to_owned(),
            size: Some(1000),
            etag: None,
        };
        paths.iter().map(remote).collect()
    }

    fn chosen(name: &str, paths: &[&str], variant: Option<&str>) -> Vec<String> {
        let name = RepoName::parse(name).unwrap();
        let plan = plan(&name, &files(paths), variant).unwrap();
        plan.files.into_iter().map(|file| file.path).collect()
    }

    fn refused(name: &str, paths: &[&str], variant: Option<&str>) -> String {
        let name = RepoName::parse(name).unwrap();
        plan(&name, &files(paths), variant).unwrap_err().to_string()
    }

    /// As stable-diffusion-v1-5/stable-diffusion-v1-5 has them.
    const SD15: &[&str] = &[
        ".gitattributes",
        "README.md",
        "feature_extractor/preprocessor_config.json",
        "model_index.json",
        "safety_checker/config.json",
        "safety_checker/model.fp16.safetensors",
        "safety_checker/model.safetensors",
        "safety_checker/pytorch_model.bin",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.fp16.safetensors",
        "text_encoder/model.safetensors",
        "text_encoder/pytorch_model.bin",
        "tokenizer/merges.txt",
        "tokenizer/special_tokens_map.json",
        "tokenizer/tokenizer_config.json",
        "tokenizer/vocab.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.non_ema.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "v1-5-pruned-emaonly.ckpt",
        "v1-5-pruned-emaonly.safetensors",
        "v1-5-pruned.safetensors",
        "v1-inference.yaml",
        "vae/config.json",
        "vae/diffusion_pytorch_model.fp16.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ];

    #[test]
    fn a_folder_gives_each_network_once() {
        let configs = [
            "model_index.json",
            "scheduler/scheduler_config.json",
            "text_encoder/config.json",
            "tokenizer/merges.txt",
            "tokenizer/special_tokens_map.json",
            "tokenizer/tokenizer_config.json",
            "tokenizer/vocab.json",
            "unet/config.json",
            "vae/config.json",
        ];
        for (variant, dotted) in [(None, ""), (Some("fp16"), ".fp16")] {
            let mut expected: Vec<String> = configs.map(str::to_owned).to_vec();
            for stem in [
                "text_encoder/model",
                "unet/diffusion_pytorch_model",
                "vae/diffusion_pytorch_model",
            ] {
                expected.push(format!("{stem}{dotted}.safetensors"));
            }
            expected.sort();
            assert_eq!(chosen("a/b", SD15, variant), expected);
        }
        assert!(refused("a/b", SD15, Some("bf16")).contains("fp16, non_ema"));
    }

    #[test]
    fn fp16_stands_in_where_it_is_all_there_is() {
        let only: Vec<&str> = SD15
            .iter()
            .copied()
            .filter(|f| *f != "unet/diffusion_pytorch_model.safetensors")
            .collect();
        let found = chosen("a/b", &only, None);
        assert!(
            found.contains(&"unet/diffusion_pytorch_model.fp16.safetensors".to_owned()),
            "{found:?}"
        );
        assert!(
            found.contains(&"vae/diffusion_pytorch_model.safetensors".to_owned()),
            "{found:?}"
        );
        let bins: Vec<&str> = SD15
            .iter()
            .copied()
            .filter(|f| !f.starts_with("unet/") || f.ends_with(".bin"))
            .collect();
        assert!(refused("a/b", &bins, None).contains("diffusion_pytorch_model.bin"));
    }

    #[test]
    fn shards_come_with_their_index() {
        let paths = [
            "model_index.json",
            "transformer/config.json",
            "transformer/diffusion_pytorch_model-00001-of-00002.safetensors",
            "transformer/diffusion_pytorch_model-00002-of-00002.safetensors",
            "transformer/diffusion_pytorch_model.safetensors.index.json",
            "transformer/diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
            "transformer/diffusion_pytorch_model.fp16-00002-of-00002.safetensors",
            "transformer/diffusion_pytorch_model.safetensors.index.fp16.json",
            "vae/diffusion_pytorch_model.safetensors",
            "vae/config.json",
            "text_encoder/model-00001-of-00002.fp16.safetensors",
            "text_encoder/model-00002-of-00002.fp16.safetensors",
            "text_encoder/model.safetensors.index.fp16.json",
        ];
        let plain = chosen("a/b", &paths, None);
        assert_eq!(
            plain
                .iter()
                .filter(|p| p.starts_with("transformer/"))
                .collect::<Vec<_>>(),
            [
                "transformer/config.json",
                "transformer/diffusion_pytorch_model-00001-of-00002.safetensors",
                "transformer/diffusion_pytorch_model-00002-of-00002.safetensors",
                "transformer/diffusion_pytorch_model.safetensors.index.json",
            ]
        );
        assert_eq!(
            plain
                .iter()
                .filter(|p| p.starts_with("text_encoder/"))
                .count(),
            3
        );
        let half = chosen("a/b", &paths, Some("fp16"));
        assert!(half.contains(
            &"transformer/diffusion_pytorch_model.fp16-00002-of-00002.safetensors".to_owned()
        ));
        assert!(half.contains(&"vae/diffusion_pytorch_model.safetensors".to_owned()));
        assert!(!half.contains(
            &"transformer/diffusion_pytorch_model-00001-of-00002.safetensors".to_owned()
        ));
    }

    #[test]
    fn a_single_file_is_found_or_the_choices_are_told() {
        assert_eq!(
            chosen(
                "a/b",
                &[
                    "README.md",
                    "dream.safetensors",
                    "dream.ckpt",
                    "old/dream.safetensors"
                ],
                None
            ),
            ["dream.safetensors"]
        );
        assert_eq!(
            chosen("a/b", &["x/dream.safetensors"], None),
            ["x/dream.safetensors"]
        );
        let two = ["a.safetensors", "b.safetensors", "c/d.safetensors"];
        let sentence = refused("o/n@r", &two, None);
        for word in [
            "o/n@r",
            "2 model files",
            "a.safetensors (1.0 kB), b.safetensors",
            ":file",
            "o/n:a.safetensors",
        ] {
            assert!(sentence.contains(word), "{word}: {sentence}");
        }
        assert_eq!(chosen("o/n:b.safetensors", &two, None), ["b.safetensors"]);
        assert_eq!(
            chosen("o/n:c/d.safetensors", &two, None),
            ["c/d.safetensors"]
        );
        assert_eq!(chosen("o/n:D.safetensors", &two, None), ["c/d.safetensors"]);
        assert!(refused("o/n:e.safetensors", &two, None).contains("a.safetensors"));
        assert!(refused("o/n", &["model.ckpt"], None).contains("`model.ckpt`"));
        assert!(refused("o/n", &["README.md"], None).contains("no model"));
        // one file of a repository that is a folder, too
        assert_eq!(
            chosen("o/n:v1-5-pruned.safetensors", SD15, None),
            ["v1-5-pruned.safetensors"]
        );
    }

    #[test]
    fn a_component_comes_with_its_config() {
        let vae = [
            "config.json",
            "diffusion_pytorch_model.bin",
            "diffusion_pytorch_model.safetensors",
            "diffusion_pytorch_model.fp16.safetensors",
        ];
        assert_eq!(
            chosen("a/vae", &vae, None),
            ["config.json", "diffusion_pytorch_model.safetensors"]
        );
        assert_eq!(
            chosen("a/vae", &vae, Some("fp16")),
            ["config.json", "diffusion_pytorch_model.fp16.safetensors"]
        );
        assert!(refused("a/vae", &vae, Some("bf16")).contains("fp16"));
    }

    #[test]
    fn what_is_there_is_told_from_what_is_not() {
        let index = serde_json::json!({
            "_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"], "safety_checker": ["x", "Y"],
            "image_encoder": [null, null], "scheduler": ["diffusers", "DDIM"],
        });
        let whole = [
            "unet/config.json",
            "unet/x.safetensors",
            "scheduler/scheduler_config.json",
        ];
        assert!(is_complete(&index, &whole));
        for missing in 1..3 {
            let some: Vec<&str> = whole
                .iter()
                .enumerate()
                .filter(|(i, _)| *i != missing)
                .map(|(_, p)| *p)
                .collect();
            assert!(!is_complete(&index, &some), "{some:?}");
        }
        let shards = [
            "unet/x-00001-of-00002.safetensors",
            "scheduler/s.json",
            "unet/x-00002-of-00002.safetensors",
        ];
        assert!(is_complete(&index, &shards) && !is_complete(&index, &shards[..2]));
        assert!(!is_complete(&serde_json::json!([]), &whole));
    }
}
