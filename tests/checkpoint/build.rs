//! Makes safetensors files: headers by hand, data as zeros that take no room on disk.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};
use tempfile::TempDir;

/// A file that lives as long as this does.
pub(crate) struct TestFile {
    pub(crate) path: PathBuf,
    _folder: TempDir,
}

/// A file named `x.safetensors` of these bytes.
pub(crate) fn file_of(bytes: &[u8]) -> TestFile {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    std::fs::write(&path, bytes).unwrap();
    TestFile {
        path,
        _folder: folder,
    }
}

/// A header in front of data.
pub(crate) fn with_header(header: &str, data: &[u8]) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend(data);
    bytes
}

/// Name, type, shape, and data if they are not zeros.
type Entry = (String, &'static str, Vec<usize>, Option<Vec<u8>>);

/// The tensors of a file to be made.
#[derive(Clone, Default)]
pub(crate) struct Tensors {
    entries: Vec<Entry>,
    metadata: Map<String, Value>,
}

impl Tensors {
    /// An f16 tensor of zeros.
    pub(crate) fn add(&mut self, name: impl Into<String>, shape: &[usize]) -> &mut Self {
        self.add_typed(name, "F16", shape)
    }

    /// A tensor of zeros.
    pub(crate) fn add_typed(
        &mut self,
        name: impl Into<String>,
        dtype: &'static str,
        shape: &[usize],
    ) -> &mut Self {
        self.entries
            .push((name.into(), dtype, shape.to_vec(), None));
        self
    }

    /// A tensor with data.
    pub(crate) fn add_bytes(
        &mut self,
        name: impl Into<String>,
        dtype: &'static str,
        shape: &[usize],
        bytes: Vec<u8>,
    ) -> &mut Self {
        self.entries
            .push((name.into(), dtype, shape.to_vec(), Some(bytes)));
        self
    }

    pub(crate) fn metadata(&mut self, name: &str, value: &str) -> &mut Self {
        self.metadata.insert(name.to_owned(), value.into());
        self
    }

    pub(crate) fn remove(&mut self, prefix: &str) -> &mut Self {
        self.entries.retain(|(name, ..)| !name.starts_with(prefix));
        self
    }

    /// Renames by replacing `from` in every name.
    pub(crate) fn rename(&mut self, from: &str, to: &str) -> &mut Self {
        for (name, ..) in &mut self.entries {
            *name = name.replace(from, to);
        }
        self
    }

    /// Writes the file; zeros are holes.
    pub(crate) fn write(&self, path: &Path) {
        let mut header = Map::new();
        if !self.metadata.is_empty() {
            header.insert("__metadata__".to_owned(), self.metadata.clone().into());
        }
        let mut offset = 0;
        let mut pieces = Vec::new();
        for (name, dtype, shape, bytes) in &self.entries {
            let unit = match *dtype {
                "F64" | "I64" => 8,
                "F32" => 4,
                "F16" | "BF16" => 2,
                _ => 1,
            };
            let end = offset + unit * shape.iter().product::<usize>();
            let entry = json!({ "dtype": dtype, "shape": shape, "data_offsets": [offset, end] });
            assert!(
                header.insert(name.clone(), entry).is_none(),
                "twice: {name}"
            );
            pieces.extend(bytes.as_ref().map(|bytes| (offset, bytes)));
            offset = end;
        }
        let header = Value::from(header).to_string();
        let mut file = File::create(path).unwrap();
        file.write_all(&with_header(&header, &[])).unwrap();
        let start = 8 + header.len();
        file.set_len((start + offset) as u64).unwrap();
        for (offset, bytes) in pieces {
            use std::io::{Seek, SeekFrom};
            file.seek(SeekFrom::Start((start + offset) as u64)).unwrap();
            file.write_all(bytes).unwrap();
        }
    }

    /// Writes a temporary file.
    pub(crate) fn file(&self) -> TestFile {
        let file = file_of(b"");
        self.write(&file.path);
        file
    }
}

/// Sizes of a synthetic Stable Diffusion.
pub(crate) struct Sizes {
    pub(crate) input: usize,
    pub(crate) channels: Vec<usize>,
    /// Transformer blocks of each level.
    pub(crate) depths: Vec<usize>,
    pub(crate) mid_depth: usize,
    pub(crate) layers: usize,
    pub(crate) context: usize,
    pub(crate) linear: bool,
}

impl Sizes {
    /// Stable Diffusion 1's own.
    pub(crate) fn sd1() -> Self {
        Self {
            input: 4,
            channels: vec![320, 640, 1280, 1280],
            depths: vec![1, 1, 1, 0],
            mid_depth: 1,
            layers: 2,
            context: 768,
            linear: false,
        }
    }

    /// Stable Diffusion 2's own.
    pub(crate) fn sd2() -> Self {
        Self {
            context: 1024,
            linear: true,
            ..Self::sd1()
        }
    }

    /// SDXL's own.
    pub(crate) fn sdxl() -> Self {
        Self {
            channels: vec![320, 640, 1280],
            depths: vec![0, 2, 10],
            mid_depth: 10,
            context: 2048,
            linear: true,
            ..Self::sd1()
        }
    }
}

/// The UNet of a single file, the tensors that structure is read from.
pub(crate) fn ldm_unet(tensors: &mut Tensors, prefix: &str, sizes: &Sizes) {
    let first = sizes.channels[0];
    tensors.add(
        format!("{prefix}input_blocks.0.0.weight"),
        &[first, sizes.input, 3, 3],
    );
    tensors.add(format!("{prefix}time_embed.0.weight"), &[4 * first, first]);
    let mut n = 1;
    for (level, (&channels, &depth)) in sizes.channels.iter().zip(&sizes.depths).enumerate() {
        if level > 0 {
            tensors.add(
                format!("{prefix}input_blocks.{n}.0.op.weight"),
                &[channels, channels, 3, 3],
            );
            n += 1;
        }
        for _ in 0..sizes.layers {
            let block = format!("{prefix}input_blocks.{n}");
            tensors.add(
                format!("{block}.0.in_layers.2.weight"),
                &[channels, channels, 3, 3],
            );
            tensors.add(
                format!("{block}.0.out_layers.3.weight"),
                &[channels, channels, 3, 3],
            );
            transformer(tensors, &format!("{block}.1"), channels, depth, sizes);
            n += 1;
        }
    }
    let last = *sizes.channels.last().unwrap();
    tensors.add(
        format!("{prefix}middle_block.0.in_layers.2.weight"),
        &[last, last, 3, 3],
    );
    transformer(
        tensors,
        &format!("{prefix}middle_block.1"),
        last,
        sizes.mid_depth,
        sizes,
    );
    let mut n = 0;
    for (&channels, &depth) in sizes.channels.iter().zip(&sizes.depths).rev() {
        for _ in 0..=sizes.layers {
            let block = format!("{prefix}output_blocks.{n}");
            tensors.add(
                format!("{block}.0.in_layers.2.weight"),
                &[channels, 2 * channels, 3, 3],
            );
            transformer(tensors, &format!("{block}.1"), channels, depth, sizes);
            n += 1;
        }
    }
    tensors.add(format!("{prefix}out.2.weight"), &[4, first, 3, 3]);
}

fn transformer(tensors: &mut Tensors, at: &str, channels: usize, depth: usize, sizes: &Sizes) {
    if depth == 0 {
        return;
    }
    let projection: &[usize] = match sizes.linear {
        true => &[channels, channels],
        false => &[channels, channels, 1, 1],
    };
    tensors.add(format!("{at}.proj_in.weight"), projection);
    for k in 0..depth {
        let block = format!("{at}.transformer_blocks.{k}");
        tensors.add(format!("{block}.norm1.weight"), &[channels]);
        tensors.add(format!("{block}.norm1.bias"), &[channels]);
        tensors.add(
            format!("{block}.attn2.to_k.weight"),
            &[channels, sizes.context],
        );
    }
}

/// The autoencoder of a single file.
pub(crate) fn ldm_vae(tensors: &mut Tensors, prefix: &str) {
    for (i, channels) in [128, 256, 512, 512].into_iter().enumerate() {
        tensors.add(
            format!("{prefix}encoder.down.{i}.block.0.conv1.weight"),
            &[channels, 128, 3, 3],
        );
    }
    tensors.add(format!("{prefix}decoder.conv_in.weight"), &[512, 4, 3, 3]);
}

/// A text tower in transformers' spelling.
pub(crate) fn clip_l(tensors: &mut Tensors, prefix: &str, width: usize) {
    tensors.add(
        format!("{prefix}embeddings.token_embedding.weight"),
        &[49408, width],
    );
    tensors.add(
        format!("{prefix}embeddings.position_embedding.weight"),
        &[77, width],
    );
    tensors.add_typed(format!("{prefix}embeddings.position_ids"), "I64", &[1, 77]);
    for i in 0..12 {
        tensors.add(
            format!("{prefix}encoder.layers.{i}.layer_norm1.weight"),
            &[width],
        );
    }
}

/// A text tower in OpenCLIP's spelling.
pub(crate) fn open_clip(tensors: &mut Tensors, prefix: &str, width: usize, layers: usize) {
    tensors.add(format!("{prefix}token_embedding.weight"), &[49408, width]);
    tensors.add(format!("{prefix}positional_embedding"), &[77, width]);
    tensors.add(format!("{prefix}ln_final.weight"), &[width]);
    for i in 0..layers {
        tensors.add(
            format!("{prefix}transformer.resblocks.{i}.ln_1.weight"),
            &[width],
        );
        tensors.add(
            format!("{prefix}transformer.resblocks.{i}.attn.in_proj_weight"),
            &[3 * width, width],
        );
    }
}

/// A whole Stable Diffusion 1.
pub(crate) fn sd1(sizes: &Sizes) -> Tensors {
    let mut tensors = Tensors::default();
    ldm_unet(&mut tensors, "model.diffusion_model.", sizes);
    ldm_vae(&mut tensors, "first_stage_model.");
    clip_l(
        &mut tensors,
        "cond_stage_model.transformer.text_model.",
        sizes.context,
    );
    tensors
}

/// A whole Stable Diffusion 2; `bias` is what the last attention's norm holds.
pub(crate) fn sd2(sizes: &Sizes, bias: f32) -> Tensors {
    let mut tensors = Tensors::default();
    ldm_unet(&mut tensors, "model.diffusion_model.", sizes);
    let blocks = sizes.channels.len() * (sizes.layers + 1);
    let name = format!(
        "model.diffusion_model.output_blocks.{}.1.transformer_blocks.0.norm1.bias",
        blocks - 1
    );
    tensors.remove(&name);
    // half of the values at plus and half at minus `bias`: that is the deviation
    let channels = sizes.channels[0];
    let values = (0..channels).map(|i| if i % 2 == 0 { bias } else { -bias });
    let bytes = values
        .flat_map(|v| half::f16::from_f32(v).to_le_bytes())
        .collect();
    tensors.add_bytes(name, "F16", &[channels], bytes);
    ldm_vae(&mut tensors, "first_stage_model.");
    open_clip(&mut tensors, "cond_stage_model.model.", sizes.context, 24);
    tensors
}
