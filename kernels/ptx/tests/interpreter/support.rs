//! Kernels in a line, and numbers in and out of device memory.

use sd_ptx::{Error, Kind, Launch, Memory, Module, Options};

/// Registers that snippets may use, and the operands of one thread: `%a %b %c` of 32 bits, `%A %B %C` of 64, `%ha %hb %hc` of 16.
const HEAD: &str = ".version 8.4
.target sm_80
.address_size 64
.visible .entry snippet(.param .u64 from, .param .u64 to)
{
.reg .pred %p<9>;
.reg .b16 %h<9>, %ha, %hb, %hc, %hd;
.reg .b32 %r<99>, %a, %b, %c, %d, %tid;
.reg .f32 %f<9>;
.reg .b64 %R<9>, %A, %B, %C, %D, %at, %place;
.reg .f64 %F<9>;
ld.param.u64 %at, [from];
mov.u32 %tid, %tid.x;
mul.wide.u32 %place, %tid, 24;
add.s64 %at, %at, %place;
ld.global.u64 %A, [%at];
ld.global.u64 %B, [%at+8];
ld.global.u64 %C, [%at+16];
cvt.u32.u64 %a, %A;
cvt.u32.u64 %b, %B;
cvt.u32.u64 %c, %C;
cvt.u16.u32 %ha, %a;
cvt.u16.u32 %hb, %b;
cvt.u16.u32 %hc, %c;
mov.u32 %d, 0;
mov.u64 %D, 0;
mov.u16 %hd, 0;
";

const TAIL: &str = "
ld.param.u64 %at, [to];
mul.wide.u32 %place, %tid, 8;
add.s64 %at, %at, %place;
st.global.u64 [%at], %D;
ret;
}
";

/// Runs a snippet for every row of operands, one thread a row; it leaves its result in `%d`, `%D` or `%hd`.
pub(crate) fn rows(code: &str, operands: &[[u64; 3]]) -> Vec<u64> {
    let last = match code {
        _ if code.contains("%D") => "",
        _ if code.contains("%hd") => "cvt.u64.u16 %D, %hd;",
        _ => "cvt.u64.u32 %D, %d;",
    };
    let module = Module::parse(&format!("{HEAD}{code}\n{last}{TAIL}"))
        .unwrap_or_else(|e| panic!("{code}: {e}"));
    let memory = Memory::new();
    let bytes: Vec<u8> = operands
        .iter()
        .flatten()
        .flat_map(|x| x.to_le_bytes())
        .collect();
    let (from, to) = (
        upload(&memory, &bytes),
        memory.alloc(operands.len() * 8).unwrap(),
    );
    let params: Vec<u8> = [from, to].iter().flat_map(|x| x.to_le_bytes()).collect();
    let launch = Launch {
        kernel: "snippet",
        grid: [1; 3],
        block: [operands.len() as u32, 1, 1],
        dynamic_shared: 0,
        params: &params,
    };
    module
        .launch(&memory, &launch)
        .unwrap_or_else(|e| panic!("{code}: {e}"));
    download(&memory, to, operands.len() * 8)
        .chunks(8)
        .map(|b| u64::from_le_bytes(b.try_into().unwrap()))
        .collect()
}

/// Runs a snippet for one row of operands.
pub(crate) fn one(code: &str, a: u64, b: u64, c: u64) -> u64 {
    rows(code, &[[a, b, c]])[0]
}

pub(crate) fn bits(x: f32) -> u64 {
    u64::from(x.to_bits())
}

pub(crate) fn upload(memory: &Memory, bytes: &[u8]) -> u64 {
    let address = memory.alloc(bytes.len()).unwrap();
    memory.write(address, bytes).unwrap();
    address
}

pub(crate) fn upload_f32(memory: &Memory, values: &[f32]) -> u64 {
    upload(
        memory,
        &values
            .iter()
            .flat_map(|x| x.to_le_bytes())
            .collect::<Vec<_>>(),
    )
}

pub(crate) fn upload_u32(memory: &Memory, values: &[u32]) -> u64 {
    upload(
        memory,
        &values
            .iter()
            .flat_map(|x| x.to_le_bytes())
            .collect::<Vec<_>>(),
    )
}

pub(crate) fn download(memory: &Memory, address: u64, bytes: usize) -> Vec<u8> {
    let mut out = vec![0; bytes];
    memory.read(address, &mut out).unwrap();
    out
}

pub(crate) fn download_u32(memory: &Memory, address: u64, count: usize) -> Vec<u32> {
    download(memory, address, count * 4)
        .chunks(4)
        .map(|b| u32::from_le_bytes(b.try_into().unwrap()))
        .collect()
}

pub(crate) fn download_f32(memory: &Memory, address: u64, count: usize) -> Vec<f32> {
    download_u32(memory, address, count)
        .into_iter()
        .map(f32::from_bits)
        .collect()
}

/// Parameters: pointers, then words.
pub(crate) fn params(pointers: &[u64], words: &[u32]) -> Vec<u8> {
    let pointers = pointers.iter().flat_map(|x| x.to_le_bytes());
    pointers
        .chain(words.iter().flat_map(|x| x.to_le_bytes()))
        .collect()
}

/// A module of one kernel `k` with a pointer `to` in `%at`, the thread's number in `%tid`, and some registers.
pub(crate) fn kernel(variables: &str, code: &str) -> String {
    format!(
        ".version 8.4
.target sm_80
.address_size 64
{variables}
.visible .entry k(.param .u64 to)
{{
.reg .pred %p<9>;
.reg .b16 %h<9>;
.reg .b32 %r<99>, %tid, %block, %lane;
.reg .f32 %f<9>;
.reg .b64 %R<9>, %at;
ld.param.u64 %at, [to];
mov.u32 %tid, %tid.x;
mov.u32 %block, %ctaid.x;
mov.u32 %lane, %laneid;
{code}
ret;
}}
"
    )
}

/// Runs such a kernel on an array of words that are all 0.
pub(crate) fn run(
    text: &str,
    grid: u32,
    block: u32,
    words: usize,
    options: &Options,
) -> Result<Vec<u32>, Error> {
    let module = Module::parse(text)?;
    let memory = Memory::new();
    let to = upload_u32(&memory, &vec![0; words]);
    let params = params(&[to], &[]);
    let launch = Launch {
        kernel: "k",
        grid: [grid, 1, 1],
        block: [block, 1, 1],
        dynamic_shared: 1024,
        params: &params,
    };
    module.launch_with(&memory, &launch, options)?;
    Ok(download_u32(&memory, to, words))
}

/// The fault of a kernel that must have one of a kind, at an instruction that contains a text.
#[track_caller]
pub(crate) fn fault(
    text: &str,
    block: u32,
    options: &Options,
    kind: Kind,
    instruction: &str,
) -> sd_ptx::Fault {
    match run(text, 2, block, 256, options) {
        Err(Error::Fault(fault)) => {
            assert_eq!(fault.kind, kind, "{fault}");
            assert!(fault.text.contains(instruction), "{fault}");
            *fault
        }
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("no fault, expected {kind:?} at {instruction}"),
    }
}
