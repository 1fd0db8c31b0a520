//! `sd-rs bench`: seconds, work and memory by stage and by layer class, beside what the machine can do at most.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor};
use sd_kernels::cpu::Level;
use sd_kernels::gpu::{self, Info};
use sd_kernels::op::LayerClass;
use sd_kernels::{Wrap, profile};
use sd_models::variant::Variant;
use serde_json::{Value, json};

use super::args::BenchArgs;
use super::fetch::open_model;
use super::full_size::{self, Model};
use super::{interrupt, kernels, print_line, set_threads};
use crate::device;
use crate::error::{Error, Result};
use crate::memory::{peak_on_card, peak_resident};
use crate::pipeline::{Conditions, Given, Networks};
use crate::spec::ModelSpec;
use crate::text::{
    self, Behind, ClipTokenizer, LongSpeaker, Readers, Speaker, Syntax, T5Tokenizer, Texts,
};

/// GFLOP and seconds by layer class.
type Classes = BTreeMap<LayerClass, (f64, f64)>;

/// Everything that was measured.
struct Report {
    family: String,
    size: usize,
    dtype: DType,
    device: &'static str,
    threads: usize,
    load: Duration,
    text: Duration,
    steps: Vec<Duration>,
    decodes: Vec<Duration>,
    total: Duration,
    /// Of one UNet call.
    unet: Classes,
    /// Of one decoding.
    vae: Classes,
    /// Not known of a card.
    peak_gflops: Option<f64>,
    peak_rss: Option<u64>,
    peak_device: Option<u64>,
    card: Option<&'static Info>,
}

/// Runs the command.
///
/// # Errors
/// Whatever stops it.
pub(super) fn run(args: &BenchArgs, quiet: bool) -> Result<()> {
    let start = Instant::now();
    interrupt::listen();
    let threads = set_threads(args.threads)?;
    let device = device::open(args.device)?;
    let dtype = device::dtype(args.dtype, &device)?;
    device::warn_untried();
    if args.kernels {
        if gpu::chosen().is_some() {
            return Err(Error::Usage(
                "--kernels measures the processor's kernels, expected --device cpu beside it"
                    .to_owned(),
            ));
        }
        return kernels::run(dtype, args.json);
    }
    let say = |text: &str| {
        if !quiet {
            eprintln!("{text}");
        }
    };
    say("loading");
    let model = load(args, &device, dtype)?;
    let networks = &model.networks;
    let load = start.elapsed();
    let scale = 1 << 3;
    let size = args.size.unwrap_or(model.size);
    if size == 0 || size > 8192 || !size.is_multiple_of(scale) {
        return Err(Error::Usage(format!(
            "--size is {size}, expected a multiple of {scale} up to 8192"
        )));
    }
    let latent = size / scale;

    say("encoding text");
    let begin = Instant::now();
    let tokenizer = ClipTokenizer::embedded()?;
    let towers = networks.towers().iter().zip(&model.roles);
    let towers = towers.map(|(tower, role)| Speaker {
        tower,
        tokenizer: &tokenizer,
        role: *role,
    });
    let t5_tokenizer = T5Tokenizer::embedded()?;
    let readers = Readers {
        towers: towers.collect(),
        behind: match (networks.t5(), model.t5_length) {
            (Some(tower), Some(length)) => Behind::T5(LongSpeaker {
                tower,
                tokenizer: &t5_tokenizer,
                length,
            }),
            (None, Some(length)) => Behind::Zeros(length, networks.config().context_width()),
            _ => Behind::Nothing,
        },
    };
    let texts = Texts {
        prompt: "",
        negative: Some(""),
        syntax: Syntax::Plain,
        clip_skip: 1,
    };
    let conditioning = text::encode(&readers, texts)?;
    let text = begin.elapsed();

    let config = networks.config();
    let guided = !config.guides_itself();
    let channels = config.latent_channels();
    let sizes = vec![size as f64; model.numbers];
    let extra = match config.extra_channels() {
        0 => None,
        more => {
            let shape = (1, more, latent, latent);
            Some(Tensor::zeros(shape, DType::F32, &device)?)
        }
    };
    let conditions = Conditions::new(
        config,
        &conditioning,
        (1, guided),
        (&[sizes.clone(), sizes], 7.5),
        &Given {
            extra,
            label: networks.label(0)?,
            ..Given::default()
        },
    )?;
    let sample = Tensor::randn(0f32, 1.0, (1, channels, latent, latent), &device)?;
    let begin = Instant::now();
    let mut denoiser = networks.denoiser(
        [1, channels, latent, latent],
        &conditions,
        &[500.0],
        (&Variant::default(), Wrap::default()),
    )?;
    let load = load + begin.elapsed();
    let mut steps = Vec::new();
    let mut times = BTreeMap::new();
    for i in 0..=args.steps {
        check_stopped()?;
        let begin = Instant::now();
        let (out, classes) = stages(|| denoiser.predict(&sample, 500.0));
        out?;
        let took = begin.elapsed();
        if i == 0 {
            say(&format!("warm-up: {:.2} s", took.as_secs_f64()));
            continue;
        }
        say(&format!(
            "step {i} of {}: {:.2} s",
            args.steps,
            took.as_secs_f64()
        ));
        add_times(&mut times, classes);
        steps.push(took);
    }
    for _ in 0..args.steps * u16::from(gpu::chosen().is_some()) {
        check_stopped()?;
        let (out, classes) = profile::measure(|| denoiser.predict(&sample, 500.0));
        out?;
        add_times(&mut times, classes);
    }
    check_stopped()?;
    drop(denoiser);
    say("decoding");
    let latents = sample.narrow(1, 0, channels.min(networks.vae_latent_channels()))?;
    let mut decodes = Vec::new();
    let mut decode_times = BTreeMap::new();
    for _ in 0..args.decodes {
        check_stopped()?;
        let begin = Instant::now();
        let (out, classes) = stages(|| networks.decode(&latents, dtype));
        out?;
        decodes.push(begin.elapsed());
        add_times(&mut decode_times, classes);
        if gpu::chosen().is_some() {
            let (out, classes) = profile::measure(|| networks.decode(&latents, dtype));
            out?;
            add_times(&mut decode_times, classes);
        }
    }

    let (unet, _) = networks.record_unet(
        (latent, latent),
        (1 + usize::from(guided), networks.tokens()),
    )?;
    let (vae, _) = networks.record_vae((latent, latent), 1)?;
    let (unet, vae) = (unet.flop_by_class(), vae.flop_by_class());
    let bf16 = dtype == DType::BF16;
    let report = Report {
        family: model.name,
        size,
        dtype,
        device: device::name(&device),
        threads,
        load,
        text,
        unet: by_class(&unet, &times, args.steps),
        vae: by_class(&vae, &decode_times, args.decodes),
        steps,
        decodes,
        total: start.elapsed(),
        peak_rss: peak_resident(),
        peak_device: peak_on_card(),
        card: gpu::chosen().map(|card| card.driver().info()),
        peak_gflops: match gpu::chosen() {
            None => Some(sd_kernels::cpu::peak_gflops(Level::current(), bf16)),
            Some(_) => None,
        },
    };
    print_line(&if args.json {
        report.json().to_string()
    } else {
        report.table()
    })
}

/// Does some work, and says where its time goes, where asking does not change it: a card runs its launches as one graph, unless it is to time each.
fn stages<T>(work: impl FnOnce() -> T) -> (T, BTreeMap<LayerClass, Duration>) {
    match gpu::chosen() {
        None => profile::measure(work),
        Some(_) => (work(), BTreeMap::new()),
    }
}

fn check_stopped() -> Result<()> {
    if interrupt::stopped() {
        Err(Error::Interrupted)
    } else {
        Ok(())
    }
}

fn load(args: &BenchArgs, device: &Device, dtype: DType) -> Result<Model> {
    if let Some(family) = args.random_weights {
        return full_size::random(family, device, dtype);
    }
    let checkpoint = open_model(args.model.as_deref(), &args.library, args.no_mmap)?.checkpoint;
    let spec = ModelSpec::read(&checkpoint, &crate::checkpoint::detect(&checkpoint))?;
    let (networks, _) = Networks::load(&checkpoint, &spec, device, dtype)?;
    Ok(Model {
        name: spec.family.id().to_owned(),
        networks,
        size: spec.defaults.size,
        roles: spec.text.iter().map(|tower| tower.role).collect(),
        numbers: spec.numbers(),
        t5_length: spec
            .t5
            .as_ref()
            .map(|t5| t5.role.length)
            .or(spec.without_t5),
    })
}

fn add_times(sums: &mut BTreeMap<LayerClass, Duration>, more: BTreeMap<LayerClass, Duration>) {
    for (class, time) in more {
        *sums.entry(class).or_default() += time;
    }
}

fn by_class(
    flop: &BTreeMap<LayerClass, u64>,
    times: &BTreeMap<LayerClass, Duration>,
    calls: u16,
) -> Classes {
    let seconds = |class| times.get(class).map_or(0.0, Duration::as_secs_f64) / f64::from(calls);
    flop.iter()
        .map(|(class, &flop)| (*class, (flop as f64 / 1e9, seconds(class))))
        .collect()
}

fn median(times: &[Duration]) -> f64 {
    let mut seconds: Vec<f64> = times.iter().map(Duration::as_secs_f64).collect();
    seconds.sort_by(f64::total_cmp);
    match seconds.len() {
        0 => 0.0,
        n if n % 2 == 1 => seconds[n / 2],
        n => (seconds[n / 2 - 1] + seconds[n / 2]) / 2.0,
    }
}

fn rate(gflop: f64, seconds: f64) -> Option<f64> {
    (seconds > 0.0 && gflop > 0.0).then(|| gflop / seconds)
}

impl Report {
    fn json(&self) -> Value {
        let classes = |value: &dyn Fn(&(f64, f64)) -> Value| -> Value {
            self.unet
                .iter()
                .map(|(class, measured)| (class.name().to_owned(), value(measured)))
                .collect::<serde_json::Map<_, _>>()
                .into()
        };
        json!({
            "family": self.family,
            "size": self.size,
            "batch": 1,
            "dtype": device::dtype_name(self.dtype),
            "device": self.device,
            "threads": self.threads,
            "cpu_level": Level::current().name(),
            "timings": {
                "load_s": self.load.as_secs_f64(),
                "text_s": self.text.as_secs_f64(),
                "step_s": self.steps.iter().map(Duration::as_secs_f64).collect::<Vec<_>>(),
                "decode_s": median(&self.decodes),
                "decodes_s": self.decodes.iter().map(Duration::as_secs_f64).collect::<Vec<_>>(),
                "total_s": self.total.as_secs_f64(),
            },
            "gflop": classes(&|(gflop, _)| json!(gflop)),
            "gflops": classes(&|&(gflop, seconds)| json!(rate(gflop, seconds))),
            "class_s": classes(&|(_, seconds)| json!(seconds)),
            "decode_gflop": total_gflop(&self.vae),
            "peak_gflops": self.peak_gflops,
            "peak_rss_bytes": self.peak_rss,
            "peak_device_bytes": self.peak_device,
            "steps_per_s": 1.0 / median(&self.steps),
            "card": self.card.map(card_json),
            "machine": std::env::consts::ARCH,
        })
    }

    fn table(&self) -> String {
        let machine = match self.card {
            None => format!(
                "{} threads, cpu ({})",
                self.threads,
                Level::current().name()
            ),
            Some(card) => card_line(card),
        };
        let mut lines = vec![
            format!(
                "{} at {}×{}, {}, {machine}",
                self.family,
                self.size,
                self.size,
                device::dtype_name(self.dtype),
            ),
            format!("load            {:8.2} s", self.load.as_secs_f64()),
            format!("text            {:8.2} s", self.text.as_secs_f64()),
        ];
        let about = format!(
            "median of {}, guidance included: {:.2} steps/s",
            self.steps.len(),
            1.0 / median(&self.steps)
        );
        lines.push(self.stage("unet step", median(&self.steps), &self.unet));
        lines.extend(self.classes(&self.unet));
        lines.push(format!("  ({about})"));
        lines.push(self.stage("vae decode", median(&self.decodes), &self.vae));
        lines.extend(self.classes(&self.vae));
        if let Some(peak) = self.peak_gflops {
            lines.push(format!(
                "machine's peak  {peak:8.1} GFLOP/s in {} products that never leave the cache",
                device::dtype_name(self.dtype)
            ));
        }
        if let Some(bytes) = self.peak_device {
            lines.push(format!(
                "card's memory   {:8.2} GB at most",
                bytes as f64 / 1e9
            ));
        }
        if let Some(bytes) = self.peak_rss {
            lines.push(format!("peak memory     {:8.2} GB", bytes as f64 / 1e9));
        }
        lines.join("\n")
    }

    fn stage(&self, name: &str, seconds: f64, classes: &Classes) -> String {
        let gflop = total_gflop(classes);
        let rate = gflop / seconds;
        format!(
            "{name:15} {seconds:8.4} s   {gflop:7.1} GFLOP {rate:7.1} GFLOP/s{}",
            self.share(rate)
        )
    }

    /// What part of the machine's peak a rate is, where that is known.
    fn share(&self, rate: f64) -> String {
        let peak = self.peak_gflops;
        peak.map_or(String::new(), |peak| {
            format!("  {:5.1} %", 100.0 * rate / peak)
        })
    }

    fn classes(&self, classes: &Classes) -> Vec<String> {
        let line = |(class, &(gflop, seconds)): (&LayerClass, &(f64, f64))| {
            let speed = rate(gflop, seconds).map_or(String::new(), |rate| {
                let share = self.share(rate);
                format!("{gflop:7.1} GFLOP {rate:7.1} GFLOP/s{share}")
            });
            format!("  {:13} {seconds:8.4} s   {speed}", class.name())
        };
        classes.iter().map(line).collect()
    }
}

fn card_line(card: &Info) -> String {
    format!(
        "{} (compute {}.{}, {} processors, {} MHz at most, {:.1} GB; its driver knows CUDA {}.{})",
        card.name,
        card.capability.0,
        card.capability.1,
        card.processors,
        card.clock,
        card.memory as f64 / 1e9,
        card.driver / 1000,
        card.driver % 1000 / 10
    )
}

fn card_json(card: &Info) -> Value {
    json!({
        "name": card.name,
        "compute_capability": format!("{}.{}", card.capability.0, card.capability.1),
        "processors": card.processors,
        "clock_mhz": card.clock,
        "memory_bytes": card.memory,
        "driver_cuda": format!("{}.{}", card.driver / 1000, card.driver % 1000 / 10),
    })
}

fn total_gflop(classes: &Classes) -> f64 {
    classes.values().map(|(gflop, _)| gflop).sum()
}
