//! Random numbers as other tools draw them, so that a seed means the same picture.

/// A stream of standard normal numbers, one an image.
#[derive(Debug, Clone)]
pub enum Generator {
    /// PyTorch's CPU generator in f32.
    Torch(Box<Torch>),
    /// Philox, as A1111's `NV` and stable-diffusion.cpp.
    Philox(Philox),
}

impl Generator {
    /// `torch.Generator("cpu").manual_seed(seed)`.
    pub fn torch(seed: u64) -> Self {
        Self::Torch(Box::new(Torch::new(seed)))
    }

    /// A1111's `NV` generator.
    pub fn philox(seed: u64) -> Self {
        Self::Philox(Philox { seed, offset: 0 })
    }

    /// The seed that it began with.
    pub fn seed(&self) -> u64 {
        match self {
            Self::Torch(torch) => torch.seed,
            Self::Philox(philox) => philox.seed,
        }
    }

    /// A fresh one of the same kind.
    #[must_use]
    pub fn reseeded(&self, seed: u64) -> Self {
        match self {
            Self::Torch(_) => Self::torch(seed),
            Self::Philox(_) => Self::philox(seed),
        }
    }

    /// The next `n` numbers, as one call of `randn` with as many elements draws them.
    pub fn normal(&mut self, n: usize) -> Vec<f32> {
        match self {
            Self::Torch(torch) => torch.normal(n),
            Self::Philox(philox) => philox.normal(n),
        }
    }
}

/// A stream of small whole numbers: `torch.randint` of PyTorch's CPU generator, whatever the noise's kind.
#[derive(Debug, Clone)]
pub struct Choices(Box<Torch>);

impl Choices {
    /// `torch.Generator("cpu").manual_seed(seed)`.
    pub fn new(seed: u64) -> Self {
        Self(Box::new(Torch::new(seed)))
    }

    /// `torch.randint(4, (n,))`.
    pub fn of_four(&mut self, n: usize) -> Vec<u8> {
        (0..n).map(|_| (self.0.next_u32() % 4) as u8).collect()
    }
}

const N: usize = 624;
const M: usize = 397;

/// mt19937 (Matsumoto & Nishimura, 1998) with PyTorch's two ways to normal numbers (ATen `DistributionTemplates.h`).
#[derive(Clone)]
pub struct Torch {
    seed: u64,
    state: [u32; N],
    index: usize,
    /// The sine of a pair of which the cosine was used; only draws of fewer than 16 leave one.
    cached: Option<f64>,
}

impl std::fmt::Debug for Torch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Torch")
            .field("index", &self.index)
            .finish_non_exhaustive()
    }
}

impl Torch {
    /// Seeds with the low 32 bits.
    fn new(seed: u64) -> Self {
        let mut state = [0u32; N];
        state[0] = seed as u32;
        for i in 1..N {
            let previous = state[i - 1];
            state[i] = 1_812_433_253u32
                .wrapping_mul(previous ^ (previous >> 30))
                .wrapping_add(i as u32);
        }
        Self {
            seed,
            state,
            index: N,
            cached: None,
        }
    }

    fn next_u32(&mut self) -> u32 {
        if self.index == N {
            for i in 0..N {
                let mixed = (self.state[i] & 0x8000_0000) | (self.state[(i + 1) % N] & 0x7fff_ffff);
                let twist = if mixed & 1 == 0 { 0 } else { 0x9908_b0df };
                self.state[i] = self.state[(i + M) % N] ^ (mixed >> 1) ^ twist;
            }
            self.index = 0;
        }
        let mut y = self.state[self.index];
        self.index += 1;
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c_5680;
        y ^= (y << 15) & 0xefc6_0000;
        y ^ (y >> 18)
    }

    /// 24 bits in [0, 1).
    fn uniform(&mut self) -> f32 {
        (self.next_u32() & 0x00ff_ffff) as f32 * 2f32.powi(-24)
    }

    /// 53 bits in [0, 1), the high word drawn first.
    fn uniform_f64(&mut self) -> f64 {
        let high = u64::from(self.next_u32());
        let low = u64::from(self.next_u32());
        ((high << 32 | low) & ((1 << 53) - 1)) as f64 * 2f64.powi(-53)
    }

    fn normal(&mut self, n: usize) -> Vec<f32> {
        if n < 16 {
            return (0..n).map(|_| self.one() as f32).collect();
        }
        let mut data: Vec<f32> = (0..n).map(|_| self.uniform()).collect();
        for block in data.chunks_exact_mut(16) {
            box_muller(block);
        }
        // a remainder is made good by drawing the last sixteen anew
        if !n.is_multiple_of(16) {
            let tail = &mut data[n - 16..];
            tail.fill_with(|| self.uniform());
            box_muller(tail);
        }
        data
    }

    /// One number of the f64 path.
    fn one(&mut self) -> f64 {
        if let Some(sine) = self.cached.take() {
            return sine;
        }
        let (u1, u2) = (self.uniform_f64(), self.uniform_f64());
        let radius = (-2.0 * (-u2).ln_1p()).sqrt();
        let angle = 2.0 * std::f64::consts::PI * u1;
        self.cached = Some(radius * angle.sin());
        radius * angle.cos()
    }
}

/// Sixteen uniforms to sixteen normals: the first half gives radii, the second angles.
fn box_muller(block: &mut [f32]) {
    for j in 0..8 {
        let (u1, u2) = (1.0 - block[j], block[j + 8]);
        let radius = (-2.0 * u1.ln()).sqrt();
        let angle = 2.0 * std::f32::consts::PI * u2;
        block[j] = radius * angle.cos();
        block[j + 8] = radius * angle.sin();
    }
}

/// Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011), one counter an element, one offset a call.
#[derive(Debug, Clone)]
pub struct Philox {
    seed: u64,
    offset: u32,
}

impl Philox {
    fn normal(&mut self, n: usize) -> Vec<f32> {
        let offset = self.offset;
        self.offset = self.offset.wrapping_add(1);
        (0..n)
            .map(|i| {
                let [g0, g1, _, _] = philox4x32([offset, 0, i as u32, 0], self.seed);
                let scale = 2f64.powi(-32);
                let u = f64::from(g0) * scale + scale / 2.0;
                let v = (f64::from(g1) * scale + scale / 2.0) * 2.0 * std::f64::consts::PI;
                ((-2.0 * u.ln()).sqrt() * v.sin()) as f32
            })
            .collect()
    }
}

fn philox4x32(mut counter: [u32; 4], seed: u64) -> [u32; 4] {
    let mut key = [seed as u32, (seed >> 32) as u32];
    for _ in 0..10 {
        let (a, b) = (
            u64::from(counter[0]) * 0xd251_1f53,
            u64::from(counter[2]) * 0xcd9e_8d57,
        );
        counter = [
            (b >> 32) as u32 ^ counter[1] ^ key[0],
            b as u32,
            (a >> 32) as u32 ^ counter[3] ^ key[1],
            a as u32,
        ];
        key = [
            key[0].wrapping_add(0x9e37_79b9),
            key[1].wrapping_add(0xbb67_ae85),
        ];
    }
    counter
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(got: &[f32], want: &[f32]) {
        for (got, want) in got.iter().zip(want) {
            assert!(
                (got - want).abs() <= 2e-6 * want.abs().max(1.0),
                "{got} {want}"
            );
        }
    }

    #[test]
    fn mt19937_gives_the_published_stream() {
        // the ten-thousandth output for seed 5489, from the C++ standard [rand.predef]
        let mut torch = Torch::new(5489);
        let last = (0..10_000).map(|_| torch.next_u32()).last();
        assert_eq!(last, Some(4_123_659_995));
    }

    #[test]
    fn philox_equals_a1111_nv() {
        // webui's documented first values for seed 0
        let got = Generator::philox(0).normal(4);
        close(
            &got,
            &[-0.924_662_6, -0.425_344_15, -2.643_845_8, 0.145_183_88],
        );
    }
}
