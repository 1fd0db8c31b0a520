//! Products of bf16 on tiles (Intel's AMX): 16 rows times 16 columns, up to 32 numbers of each at an instruction.
//!
//! Eight registers hold a tile each: four of sums (32 rows × 32 columns), two of rows and two of weights, so that every tile that is read is
//! used twice. A panel is already what the instruction wants, pairs of `k` side by side. Rows are read where they lie if they are equally far
//! apart, as those of a linear layer are, or 16 neighbours of a picture; else they are copied together first. What is left over is no
//! other case: the shape of a tile is set by its rows and pairs, and nothing outside is touched.
//!
//! Shapes and tiles are a thread's own state: a call sets them and lets go of them.

use std::arch::asm;
use std::arch::x86_64::__cpuid_count;
use std::cell::RefCell;
use std::cmp::Reverse;
use std::ops::Range;
use std::sync::OnceLock;

use half::bf16;

use super::micro::{Segments, Tile};

/// Rows, and columns, of a tile.
const SIDE: usize = 16;
/// Pairs of numbers that a row of a tile holds at most.
const PAIRS: usize = 16;
/// Steps of `k` in one go: the weights of a panel stay in the second-level cache until all rows have passed, and what is copied does, too.
const CHUNK: usize = 64;

/// Whether the processor has tiles of bf16, and the system lets this process use them.
pub(super) fn is_available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| has_tiles() && is_granted())
}

/// What the processor says, and which registers the system keeps for each thread (`is_x86_feature_detected!` knows no tiles yet).
fn has_tiles() -> bool {
    const BF16: u32 = 1 << 22;
    const TILE: u32 = 1 << 24;
    const OSXSAVE: u32 = 1 << 27;
    /// XTILECFG and XTILEDATA.
    const KEPT: u32 = 0b11 << 17;
    if __cpuid_count(0, 0).eax < 7 || __cpuid_count(1, 0).ecx & OSXSAVE == 0 {
        return false;
    }
    let kept: u32;
    // SAFETY: OSXSAVE says that the instruction is there; it reads register 0
    unsafe {
        asm!("xgetbv", in("ecx") 0, out("eax") kept, out("edx") _, options(nomem, nostack, preserves_flags));
    }
    __cpuid_count(7, 0).edx & (BF16 | TILE) == BF16 | TILE && kept & KEPT == KEPT
}

/// Linux gives tiles' 8 KiB to the threads of a process that asks for them, those that are there already included.
#[cfg(target_os = "linux")]
fn is_granted() -> bool {
    const ARCH_PRCTL: usize = 158;
    const ARCH_REQ_XCOMP_PERM: usize = 0x1023;
    const XTILEDATA: usize = 18;
    let result: isize;
    // SAFETY: the call takes two numbers, and changes no memory of this process
    unsafe {
        asm!(
            "syscall", inlateout("rax") ARCH_PRCTL => result, in("rdi") ARCH_REQ_XCOMP_PERM, in("rsi") XTILEDATA,
            lateout("rcx") _, lateout("r11") _, options(nostack),
        );
    }
    result == 0
}

/// Other systems have ways of their own, which nobody has tried.
#[cfg(not(target_os = "linux"))]
fn is_granted() -> bool {
    false
}

/// A product of any number of rows.
///
/// # Safety
/// As [`super::micro::Kernel`], for `tile.rows` and 16 · `VECTORS` columns.
pub(super) unsafe fn bf16_tiles<const VECTORS: usize>(tile: &Tile<'_, bf16>) {
    thread_local! {
        static ROOM: RefCell<Room> = const { RefCell::new(Room { runs: Vec::new(), all: Vec::new(), parts: Vec::new(), strides: Vec::new(), copies: Vec::new() }) };
    }
    // SAFETY: passed on
    ROOM.with_borrow_mut(|room| unsafe { room.product(tile, VECTORS) });
}

/// What a call works in; kept so that no call has to find room anew.
struct Room {
    runs: Vec<Run>,
    /// All parts of a product, and those that are taken in one go.
    all: Vec<Part>,
    parts: Vec<Part>,
    /// For 16 rows after 16 rows, those of each segment: bytes from one to the next where they are equally far apart.
    strides: Vec<Option<usize>>,
    /// Rows that are not.
    copies: Vec<Line>,
}

/// Steps of one segment.
#[derive(Clone, Copy)]
struct Part {
    segment: usize,
    /// The first of their pairs in it.
    pair: usize,
    /// The first of their `k` in the panel.
    k: usize,
    /// Pairs of a step.
    pairs: usize,
    steps: usize,
}

/// Steps as the innermost loop takes them: two tiles of rows and where their weights begin; bytes everywhere.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Run {
    rows: [Lines; 2],
    weights: *const u8,
    steps: usize,
    /// From one step to the next, in rows and in weights.
    row_step: usize,
    weight_step: usize,
}

/// Rows of a tile: the first, and bytes from one to the next.
#[derive(Clone, Copy)]
#[repr(C)]
struct Lines {
    first: *const u8,
    apart: usize,
}

/// A line of a cache.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Line(#[expect(dead_code, reason = "read through pointers")] [u8; 64]);

/// How the `k` of a segment are taken: `each` steps of `pairs` pairs, from pair `first`.
struct Cut {
    first: usize,
    each: usize,
    pairs: usize,
}

/// Equal steps, as few as can be, or whole tiles and a rest.
fn cuts(pairs: usize) -> [Cut; 2] {
    let least = pairs.div_ceil(PAIRS);
    // of no pairs there are no steps: a tile of no bytes cannot be configured
    let equal = (least..=least + least / 2 + 1).find(|n| pairs > 0 && pairs.is_multiple_of(*n));
    let (each, of, rest) = match equal {
        Some(each) => (each, pairs / each, 0),
        None => (pairs / PAIRS, PAIRS, pairs % PAIRS),
    };
    [
        Cut {
            first: 0,
            each,
            pairs: of,
        },
        Cut {
            first: each * of,
            each: usize::from(rest > 0),
            pairs: rest,
        },
    ]
}

/// Bytes from one row to the next, if all are equally far apart.
fn stride(rows: &[*const bf16]) -> Option<usize> {
    let step = match rows {
        [first, second, ..] => (second.addr()).wrapping_sub(first.addr()),
        _ => 0,
    };
    // no branch, so that the compiler takes them by eights
    let off = rows
        .windows(2)
        .map(|pair| pair[1].addr().wrapping_sub(pair[0].addr()) ^ step);
    (off.fold(0, |all, off| all | off) == 0).then_some(step)
}

impl Room {
    /// # Safety
    /// As [`bf16_tiles`].
    unsafe fn product(&mut self, tile: &Tile<'_, bf16>, vectors: usize) {
        let segments: usize = tile.segments.iter().map(|of| of.count).sum();
        // SAFETY: `rows` pointers for every segment
        let rows = unsafe { std::slice::from_raw_parts(tile.a, segments * tile.rows) };
        self.strides.clear();
        for first in (0..tile.rows).step_by(SIDE) {
            let count = (tile.rows - first).min(SIDE);
            let of = |s: usize| stride(&rows[s * tile.rows + first..][..count]);
            self.strides.extend((0..segments).map(of));
        }
        self.list(tile.segments);
        let (mut add, mut done) = (tile.add, 0);
        while done < self.all.len() {
            let pairs = self.all[done].pairs;
            let alike = self.all[done..].iter().take_while(|p| p.pairs == pairs);
            let (count, total) = alike.fold((0, 0), |(n, steps), p| (n + 1, steps + p.steps));
            let most = total.div_ceil(total.div_ceil(CHUNK));
            for first in (0..total).step_by(most) {
                self.choose(done..done + count, first..(first + most).min(total));
                // SAFETY: passed on
                unsafe { self.chunk(tile, (rows, vectors), (pairs, add)) };
                add = true;
            }
            done += count;
        }
        if !add {
            for r in 0..tile.rows {
                // SAFETY: a row of sums, of no numbers at all
                unsafe { tile.c.add(r * tile.ldc).write_bytes(0, SIDE * vectors) };
            }
        }
        // SAFETY: it only gives up what `chunk` set
        unsafe { asm!("tilerelease", options(nostack, preserves_flags, nomem)) };
    }

    /// Lists all parts, those of as many pairs together: tiles are set once for them, and sums stay in theirs.
    fn list(&mut self, segments: &[Segments]) {
        self.all.clear();
        let (mut segment, mut k) = (0, 0);
        for of in segments {
            for s in 0..of.count {
                let cuts = cuts(of.k_len / 2).into_iter().filter(|cut| cut.each > 0);
                self.all.extend(cuts.map(|cut| Part {
                    segment: segment + s,
                    pair: cut.first,
                    k: k + s * of.k_len + 2 * cut.first,
                    pairs: cut.pairs,
                    steps: cut.each,
                }));
            }
            segment += of.count;
            k += of.count * of.k_len;
        }
        self.all
            .sort_unstable_by_key(|part| (Reverse(part.pairs), part.k));
    }

    /// Chooses steps `steps` of those of some parts.
    fn choose(&mut self, parts: Range<usize>, steps: Range<usize>) {
        self.parts.clear();
        let mut at = 0;
        for part in &self.all[parts] {
            let skipped = steps.start.saturating_sub(at).min(part.steps);
            let count = steps.end.saturating_sub(at).min(part.steps) - skipped;
            at += part.steps;
            if count > 0 {
                self.parts.push(Part {
                    pair: part.pair + skipped * part.pairs,
                    k: part.k + 2 * skipped * part.pairs,
                    steps: count,
                    ..*part
                });
            }
        }
    }

    /// All rows times the weights of the listed parts.
    ///
    /// # Safety
    /// As [`bf16_tiles`].
    unsafe fn chunk(
        &mut self,
        tile: &Tile<'_, bf16>,
        (rows, vectors): (&[*const bf16], usize),
        (pairs, add): (usize, bool),
    ) {
        let mut set = [0; 2];
        for first in (0..tile.rows).step_by(2 * SIDE) {
            let left = tile.rows - first;
            let counts = [left.min(SIDE), left.saturating_sub(SIDE).min(SIDE)];
            if counts != set {
                let shapes = Shapes::new(counts, pairs);
                // SAFETY: a valid configuration, of 64 bytes
                unsafe {
                    asm!("ldtilecfg [{}]", in(reg) &raw const shapes, options(nostack, preserves_flags, readonly));
                }
                set = counts;
            }
            // SAFETY: passed on
            unsafe { self.place(tile, rows, (first, counts), (16 * vectors, pairs)) };
            for vector in (0..vectors).step_by(2) {
                // SAFETY: sums of these rows and columns
                let sums = unsafe { tile.c.add(first * tile.ldc + vector * SIDE) };
                let pass = Pass {
                    runs: &self.runs,
                    vector,
                    line: 64 * vectors,
                    sums: (sums, 4 * tile.ldc),
                    add,
                };
                // SAFETY: shapes are set; runs list rows and weights that are there
                unsafe {
                    match (counts[1] > 0, vector + 1 < vectors) {
                        (true, true) => pass.run::<2, 2>(),
                        (true, false) => pass.run::<2, 1>(),
                        (false, true) => pass.run::<1, 2>(),
                        (false, false) => pass.run::<1, 1>(),
                    }
                }
            }
        }
    }

    /// Lists the runs of up to 32 rows from `first`, and copies together what does not lie evenly.
    ///
    /// # Safety
    /// As [`bf16_tiles`].
    unsafe fn place(
        &mut self,
        tile: &Tile<'_, bf16>,
        rows: &[*const bf16],
        (first, counts): (usize, [usize; 2]),
        (width, pairs): (usize, usize),
    ) {
        let step = 4 * pairs;
        let segments = rows.len() / tile.rows;
        let all: usize = self.parts.iter().map(|part| part.steps).sum();
        // a line more, so that rows do not all fall into the same sets of a cache
        let line = (all * step).next_multiple_of(64) + 64;
        let lines = 2 * SIDE * line / size_of::<Line>();
        if self.copies.len() < lines {
            self.copies.resize(lines, Line([0; size_of::<Line>()]));
        }
        let copies = self.copies.as_mut_ptr().cast::<u8>();
        self.runs.clear();
        let mut done = 0;
        for part in &self.parts {
            let bytes = part.steps * step;
            let half = |half: usize| {
                let (first, count) = (first + half * SIDE, counts[half]);
                if count == 0 {
                    return Lines {
                        first: std::ptr::null(),
                        apart: 0,
                    };
                }
                let rows = &rows[part.segment * tile.rows + first..][..count];
                if let Some(apart) = self.strides[first / SIDE * segments + part.segment] {
                    let first = rows[0].wrapping_add(2 * part.pair).cast();
                    return Lines { first, apart };
                }
                let to = copies.wrapping_add(half * SIDE * line + done);
                for (i, row) in rows.iter().enumerate() {
                    // SAFETY: pairs of a segment; a row of the copies, which has room for all parts
                    unsafe {
                        let from = row.add(2 * part.pair).cast::<u8>();
                        std::ptr::copy_nonoverlapping(from, to.add(i * line), bytes);
                    }
                }
                Lines {
                    first: to.cast_const(),
                    apart: line,
                }
            };
            let rows = [half(0), half(1)];
            self.runs.push(Run {
                rows,
                weights: tile.panel.wrapping_add(part.k * width).cast(),
                steps: part.steps,
                row_step: step,
                weight_step: step * width,
            });
            done += bytes;
        }
    }
}

/// What `ldtilecfg` reads (Intel's manual, volume 1, 18.2): palette 1, and bytes of a line and lines of each tile.
#[repr(C, align(64))]
struct Shapes {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    bytes: [u16; 16],
    lines: [u8; 16],
}

impl Shapes {
    /// Tiles 0 to 3 are sums, 4 and 5 rows, 6 and 7 weights.
    fn new(rows: [usize; 2], pairs: usize) -> Self {
        let (mut bytes, mut lines) = ([0; 16], [0; 16]);
        let mut set = |tile: usize, count: usize, width: usize| {
            // none of both where there are no rows
            (lines[tile], bytes[tile]) = (count as u8, if count > 0 { width as u16 } else { 0 });
        };
        for i in 0..4 {
            set(i, rows[i / 2], 64);
        }
        for (i, &rows) in rows.iter().enumerate() {
            set(4 + i, rows, 4 * pairs);
            set(6 + i, pairs, 64);
        }
        Self {
            palette: 1,
            start_row: 0,
            reserved: [0; 14],
            bytes,
            lines,
        }
    }
}

/// Up to 32 rows times up to 32 columns of a panel.
struct Pass<'a> {
    runs: &'a [Run],
    /// The first 16 columns.
    vector: usize,
    /// Bytes of a line of weights.
    line: usize,
    /// Where sums go, and bytes from one row to the next.
    sums: (*mut f32, usize),
    /// Whether they are added to what is there.
    add: bool,
}

impl Pass<'_> {
    /// # Safety
    /// Shapes are set for `ROWS` tiles of rows; the runs have these, and weights of 16 · `COLUMNS` columns; the sums are writable.
    unsafe fn run<const ROWS: usize, const COLUMNS: usize>(&self) {
        let Range { start, end } = self.runs.as_ptr_range();
        // SAFETY: the caller's promise: tiles have the shapes that were set, and read and write nothing else
        unsafe {
            asm!(
                // the second 16 rows of sums
                "lea {b}, [{c} + 8*{ldc}]",
                "lea {b}, [{b} + 8*{ldc}]",
                "test {n}, {n}",
                "jz 2f",
                "tileloadd tmm0, [{c} + {ldc}]",
                ".if {columns} > 1", "tileloadd tmm1, [{c} + {ldc} + 64]", ".endif",
                ".if {rows} > 1", "tileloadd tmm2, [{b} + {ldc}]", ".endif",
                ".if {rows} * {columns} > 2", "tileloadd tmm3, [{b} + {ldc} + 64]", ".endif",
                "jmp 3f",
                "2:",
                "tilezero tmm0",
                ".if {columns} > 1", "tilezero tmm1", ".endif",
                ".if {rows} > 1", "tilezero tmm2", ".endif",
                ".if {rows} * {columns} > 2", "tilezero tmm3", ".endif",
                "3:",
                "mov {a0}, [{run}]",
                "mov {s0}, [{run} + 8]",
                "mov {a1}, [{run} + 16]",
                "mov {s1}, [{run} + 24]",
                "mov {b}, [{run} + 32]",
                "add {b}, {first}",
                "mov {n}, [{run} + 40]",
                "4:",
                "tileloadd tmm4, [{a0} + {s0}]",
                "tileloadd tmm6, [{b} + {ldb}]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                ".if {columns} > 1",
                "tileloadd tmm7, [{b} + {ldb} + 64]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                ".endif",
                ".if {rows} > 1",
                "tileloadd tmm5, [{a1} + {s1}]",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "add {a1}, [{run} + 48]",
                ".endif",
                ".if {rows} * {columns} > 2",
                "tdpbf16ps tmm3, tmm5, tmm7",
                ".endif",
                "add {a0}, [{run} + 48]",
                "add {b}, [{run} + 56]",
                "dec {n}",
                "jnz 4b",
                "add {run}, 64",
                "cmp {run}, {end}",
                "jne 3b",
                "lea {b}, [{c} + 8*{ldc}]",
                "lea {b}, [{b} + 8*{ldc}]",
                "tilestored [{c} + {ldc}], tmm0",
                ".if {columns} > 1", "tilestored [{c} + {ldc} + 64], tmm1", ".endif",
                ".if {rows} > 1", "tilestored [{b} + {ldc}], tmm2", ".endif",
                ".if {rows} * {columns} > 2", "tilestored [{b} + {ldc} + 64], tmm3", ".endif",
                rows = const ROWS,
                columns = const COLUMNS,
                run = inout(reg) start => _,
                end = in(reg) end,
                first = in(reg) self.vector * 64,
                n = inout(reg) usize::from(self.add) => _,
                c = in(reg) self.sums.0,
                ldc = in(reg) self.sums.1,
                ldb = in(reg) self.line,
                a0 = out(reg) _, s0 = out(reg) _, a1 = out(reg) _, s1 = out(reg) _, b = out(reg) _,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_cover_every_pair_once() {
        for pairs in 0..400 {
            let cuts = cuts(pairs);
            let covered: usize = cuts.iter().map(|cut| cut.each * cut.pairs).sum();
            assert_eq!(covered, pairs);
            assert!(cuts[0].first == 0 && cuts[1].first == cuts[0].each * cuts[0].pairs);
            assert!(cuts.iter().all(|cut| cut.pairs <= PAIRS));
            assert!(cuts.iter().all(|cut| cut.each == 0 || cut.pairs > 0));
        }
    }

    #[test]
    fn a_stride_is_one_for_all() {
        let rows = |places: &[usize]| -> Vec<*const bf16> {
            places
                .iter()
                .map(|&place| std::ptr::without_provenance(place))
                .collect()
        };
        assert_eq!(stride(&rows(&[4])), Some(0));
        assert_eq!(stride(&rows(&[8, 8, 8])), Some(0));
        assert_eq!(stride(&rows(&[4, 68, 132])), Some(64));
        assert_eq!(stride(&rows(&[132, 68, 4])), Some(64usize.wrapping_neg()));
        assert_eq!(stride(&rows(&[4, 68, 133])), None);
    }
}
