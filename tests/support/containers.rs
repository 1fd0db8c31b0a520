//! Containers other than safetensors, made by hand: pickles an instruction at a time, zip archives, GGUF.

use safetensors::Dtype;

use super::weights::Stored;

/// A pickle of protocol 2 in the making.
#[derive(Clone)]
pub(crate) struct Pickle(pub(crate) Vec<u8>);

impl Pickle {
    pub(crate) fn new() -> Self {
        Self(vec![0x80, 2])
    }

    /// Instructions as they are.
    pub(crate) fn raw(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }

    pub(crate) fn text(self, text: &str) -> Self {
        let length = (text.len() as u32).to_le_bytes();
        self.raw(b"X").raw(&length).raw(text.as_bytes())
    }

    pub(crate) fn int(self, number: i64) -> Self {
        self.raw(&[0x8a, 8]).raw(&number.to_le_bytes())
    }

    pub(crate) fn ints(mut self, numbers: &[i64]) -> Self {
        self = self.raw(b"(");
        for &number in numbers {
            self = self.int(number);
        }
        self.raw(b"t")
    }

    pub(crate) fn global(self, name: &str) -> Self {
        let (module, name) = name.rsplit_once('.').unwrap();
        self.raw(format!("c{module}\n{name}\n").as_bytes())
    }

    /// A tensor: `count` numbers are in the record `key`, `shape` and `strides` from `offset` on are the tensor.
    pub(crate) fn tensor(
        self,
        (key, kind, count): (&str, &str, i64),
        offset: i64,
        shape: &[i64],
        strides: &[i64],
    ) -> Self {
        self.global("torch._utils._rebuild_tensor_v2")
            .raw(b"((")
            .text("storage")
            .global(&format!("torch.{kind}Storage"))
            .text(key)
            .text("cpu")
            .int(count)
            .raw(b"NtQ")
            .int(offset)
            .ints(shape)
            .ints(strides)
            .raw(b"\x89}tR")
    }

    /// The finished pickle.
    pub(crate) fn end(self) -> Vec<u8> {
        self.raw(b".").0
    }
}

fn storage_kind(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::F32 => "Float",
        Dtype::F16 => "Half",
        Dtype::BF16 => "BFloat16",
        Dtype::I64 => "Long",
        Dtype::I32 => "Int",
        other => panic!("not written: {other}"),
    }
}

fn dense(shape: &[usize]) -> (Vec<i64>, Vec<i64>) {
    let mut strides: Vec<i64> = Vec::new();
    let mut stride = 1;
    for &dim in shape.iter().rev() {
        strides.push(stride);
        stride *= dim as i64;
    }
    strides.reverse();
    (shape.iter().map(|&dim| dim as i64).collect(), strides)
}

/// `{'epoch': 4, 'state_dict': OrderedDict(tensors), 'callbacks': {ModelCheckpoint: {}}}`; tensor number i in the record i.
fn lightning(tensors: &[Stored]) -> Pickle {
    let mut pickle = Pickle::new().raw(b"}(").text("epoch").int(4);
    pickle = pickle.text("state_dict").global("collections.OrderedDict");
    pickle = pickle.raw(b")R(");
    for (i, tensor) in tensors.iter().enumerate() {
        let (shape, strides) = dense(&tensor.shape);
        let count = shape.iter().product();
        let storage = (i.to_string(), storage_kind(tensor.dtype), count);
        pickle = pickle.text(&tensor.name);
        pickle = pickle.tensor((&storage.0, storage.1, storage.2), 0, &shape, &strides);
    }
    pickle
        .raw(b"u")
        .text("callbacks")
        .raw(b"}")
        .global("pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")
        .raw(b"}su")
}

/// The tensors as torch.save writes them since 1.6.
pub(crate) fn torch_archive(tensors: &[Stored]) -> Vec<u8> {
    let program = lightning(tensors).end();
    let mut entries: Vec<(String, &[u8])> = vec![("m/data.pkl".to_owned(), &program)];
    for (i, tensor) in tensors.iter().enumerate() {
        entries.push((format!("m/data/{i}"), &tensor.bytes));
    }
    zip(&entries)
}

/// The tensors as torch.save wrote them before.
pub(crate) fn torch_stream(tensors: &[Stored]) -> Vec<u8> {
    let mut file = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.".to_vec();
    file.extend(
        Pickle::new()
            .raw(b"}(")
            .text("little_endian")
            .raw(b"\x88u")
            .end(),
    );
    file.extend(lightning(tensors).end());
    let keys = (0..tensors.len()).fold(Pickle::new().raw(b"]("), |p, i| p.text(&i.to_string()));
    file.extend(keys.raw(b"e").end());
    for tensor in tensors {
        let count: usize = tensor.shape.iter().product();
        file.extend((count as u64).to_le_bytes());
        file.extend(&tensor.bytes);
    }
    file
}

/// An archive of entries as they are.
pub(crate) fn zip<T: AsRef<[u8]>>(entries: &[(String, T)]) -> Vec<u8> {
    let (mut file, mut directory) = (Vec::new(), Vec::new());
    for (name, bytes) in entries {
        let (header, bytes) = (file.len() as u32, bytes.as_ref());
        let size = (bytes.len() as u32).to_le_bytes();
        let length = (name.len() as u16).to_le_bytes();
        // flags, method, time and date, checksum: none
        file.extend(b"PK\x03\x04\x0a\0\0\0\0\0\0\0\0\0\0\0\0\0");
        file.extend([size, size].concat());
        file.extend(length);
        file.extend(b"\0\0");
        file.extend(name.as_bytes());
        file.extend(bytes);
        directory.extend(b"PK\x01\x02\x0a\0\x0a\0\0\0\0\0\0\0\0\0\0\0\0\0");
        directory.extend([size, size].concat());
        directory.extend(length);
        directory.extend([0; 12]);
        directory.extend(header.to_le_bytes());
        directory.extend(name.as_bytes());
    }
    let (at, length) = (file.len() as u32, directory.len() as u32);
    let count = (entries.len() as u16).to_le_bytes();
    file.extend(directory);
    file.extend(b"PK\x05\x06\0\0\0\0");
    file.extend([count, count].concat());
    file.extend([length.to_le_bytes(), at.to_le_bytes()].concat());
    file.extend(b"\0\0");
    file
}

/// A GGUF file in the making.
pub(crate) struct Gguf {
    pub(crate) version: u32,
    pub(crate) keys: Vec<Vec<u8>>,
    /// Name, dimensions innermost first, ggml's number of the type, data.
    pub(crate) tensors: Vec<(String, Vec<u64>, u32, Vec<u8>)>,
}

/// A text of a GGUF file.
pub(crate) fn gguf_text(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
}

impl Gguf {
    pub(crate) fn new() -> Self {
        Self {
            version: 3,
            keys: Vec::new(),
            tensors: Vec::new(),
        }
    }

    /// A key with a value of type `kind`.
    pub(crate) fn key(&mut self, name: &str, kind: u32, value: &[u8]) -> &mut Self {
        self.keys
            .push([&gguf_text(name)[..], &kind.to_le_bytes(), value].concat());
        self
    }

    pub(crate) fn tensor(
        &mut self,
        name: &str,
        shape: &[usize],
        kind: u32,
        data: Vec<u8>,
    ) -> &mut Self {
        let dims = shape.iter().rev().map(|&dim| dim as u64).collect();
        self.tensors.push((name.to_owned(), dims, kind, data));
        self
    }

    /// Tensors of plain types.
    pub(crate) fn plain(tensors: &[Stored]) -> Self {
        let mut file = Self::new();
        for tensor in tensors {
            let kind = match tensor.dtype {
                Dtype::F32 => 0,
                Dtype::F16 => 1,
                Dtype::I32 => 26,
                Dtype::I64 => 27,
                Dtype::BF16 => 30,
                other => panic!("not written: {other}"),
            };
            file.tensor(&tensor.name, &tensor.shape, kind, tensor.bytes.clone());
        }
        file
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut file = b"GGUF".to_vec();
        file.extend(self.version.to_le_bytes());
        file.extend((self.tensors.len() as u64).to_le_bytes());
        file.extend((self.keys.len() as u64).to_le_bytes());
        file.extend(self.keys.concat());
        let mut data = Vec::new();
        for (name, dims, kind, bytes) in &self.tensors {
            file.extend(gguf_text(name));
            file.extend((dims.len() as u32).to_le_bytes());
            file.extend(dims.iter().flat_map(|dim| dim.to_le_bytes()));
            file.extend(kind.to_le_bytes());
            file.extend((data.len() as u64).to_le_bytes());
            data.extend(bytes);
            data.resize(data.len().next_multiple_of(32), 0);
        }
        file.resize(file.len().next_multiple_of(32), 0);
        file.extend(data);
        file
    }
}

/// The archive of [`zip`] with every number of its directory in zip64 fields, as of files beyond 4 GB.
pub(crate) fn zip64<T: AsRef<[u8]>>(entries: &[(String, T)]) -> Vec<u8> {
    let narrow = zip(entries);
    let end = narrow.len() - 22;
    let number = |at: usize| u32::from_le_bytes(narrow[at..at + 4].try_into().unwrap());
    let start = number(end + 16) as usize;
    let mut file = narrow[..start].to_vec();
    let mut at = start;
    for (name, _) in entries {
        let wide = [number(at + 20), number(at + 24), number(at + 42)];
        let mut head = narrow[at..at + 46].to_vec();
        head[20..28].fill(0xff);
        head[42..46].fill(0xff);
        head[30] = 32;
        file.extend(head);
        file.extend(name.as_bytes());
        // another field comes first
        file.extend(b"UT\x00\x00\x01\x00\x18\x00");
        file.extend(wide.iter().flat_map(|&n| u64::from(n).to_le_bytes()));
        at += 46 + name.len();
    }
    let (length, record) = ((file.len() - start) as u64, file.len() as u64);
    file.extend(b"PK\x06\x06");
    file.extend(44u64.to_le_bytes());
    file.extend([0; 12]);
    file.extend(
        [
            entries.len() as u64,
            entries.len() as u64,
            length,
            start as u64,
        ]
        .map(u64::to_le_bytes)
        .concat(),
    );
    file.extend(b"PK\x06\x07\0\0\0\0");
    file.extend(record.to_le_bytes());
    file.extend(b"\x01\0\0\0PK\x05\x06\0\0\0\0");
    file.extend([0xff; 12]);
    file.extend(b"\0\0");
    file
}
