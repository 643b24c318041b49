//! Where a run ran: the machine, the card and its state, the machine code.

use nvml_wrapper::Nvml;
use nvml_wrapper::enum_wrappers::device::{Clock, TemperatureSensor};
use serde::{Deserialize, Serialize};

use crate::driver::DeviceInfo;
use crate::runtime::Runtime;

/// Where a run ran.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Environment {
    /// Version of this crate.
    pub flashcore: String,
    /// `cpu` or `cuda:N`.
    pub device: String,
    /// Why this device, when it was not asked for.
    pub why: Option<String>,
    /// The GPU.
    pub gpu: Option<Gpu>,
    /// The machine code.
    pub bundle: Option<BundleRecord>,
    /// The host's processor.
    pub cpu: String,
    /// Threads of the CPU backend.
    pub threads: usize,
    /// Operating system and architecture.
    pub platform: String,
    /// The inputs' seed.
    pub seed: u64,
}

/// A GPU and its driver.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Gpu {
    /// Marketing name.
    pub name: String,
    /// Compute capability.
    pub compute_capability: String,
    /// Streaming multiprocessors.
    pub sm_count: u32,
    /// Device memory in bytes.
    pub total_memory: usize,
    /// L2 cache in bytes.
    #[serde(default)]
    pub l2_bytes: u32,
    /// CUDA version of the driver.
    pub cuda: String,
    /// What the management library adds, where there is one.
    #[serde(default)]
    pub board: Option<Board>,
}

/// A card as its management library (NVML) describes it. `None` is what it does not say.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Board {
    /// Version of the driver.
    pub driver: String,
    /// Hash of the card's UUID: tells cards apart without naming them.
    pub uuid_hash: Option<String>,
    /// Enforced power limit, watts.
    pub power_cap_w: Option<f64>,
    /// Whether memory corrects errors.
    pub ecc: Option<bool>,
    /// Whether the card is partitioned.
    pub mig: Option<bool>,
    /// The highest SM and memory clocks, MHz.
    pub max_clocks_mhz: [Option<u32>; 2],
}

/// A card at one moment.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// SM and memory clocks, MHz.
    pub clocks_mhz: [Option<u32>; 2],
    /// Degrees Celsius.
    pub temperature_c: Option<u32>,
    /// Watts.
    pub power_w: Option<f64>,
    /// Why the clocks are below their highest.
    pub throttle_reasons: Vec<String>,
}

/// Which machine code ran.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BundleRecord {
    /// Its architecture.
    pub arch: String,
    /// Hash of the bundle file.
    pub sha256: String,
    /// Number of variants.
    pub variants: usize,
    /// The Triton that compiled it.
    pub triton: String,
    /// The assembler.
    pub ptxas: String,
}

impl Environment {
    /// Describes a runtime. `bundle` are the bytes of a bundle that is not embedded.
    pub fn of(runtime: &Runtime, why: Option<String>, bundle: Option<&[u8]>, seed: u64) -> Self {
        let gpu = runtime.device_info().map(|info| Gpu {
            name: info.name.clone(),
            compute_capability: format!("{}.{}", info.compute_capability.0, info.compute_capability.1),
            sm_count: info.sm_count,
            total_memory: info.total_memory,
            l2_bytes: info.l2_bytes,
            cuda: format!("{}.{}", info.driver_version / 1000, info.driver_version % 1000 / 10),
            board: Board::read(info),
        });
        let record = runtime.manifest().map(|manifest| BundleRecord {
            arch: manifest.arch.clone(),
            sha256: bundle.or_else(|| embedded(&manifest.arch)).map(crate::bundle::sha256_hex).unwrap_or_default(),
            variants: manifest.variants.len(),
            triton: manifest.compiler.triton.clone(),
            ptxas: manifest.compiler.ptxas.clone(),
        });
        Self {
            flashcore: env!("CARGO_PKG_VERSION").into(),
            device: runtime.device().to_string(),
            why,
            gpu,
            bundle: record,
            cpu: processor(),
            threads: rayon::current_num_threads(),
            platform: format!("{}-{}", std::env::consts::OS, std::env::consts::ARCH),
            seed,
        }
    }

    /// One line for people.
    pub fn summary(&self) -> String {
        let on = match (&self.gpu, &self.bundle) {
            (Some(gpu), Some(bundle)) => {
                format!("{} ({}), CUDA {}, bundle {}", self.device, gpu.name, gpu.cuda, bundle.arch)
            }
            _ => format!("the CPU backend, {} threads of {}", self.threads, self.cpu),
        };
        let why = self.why.as_ref().map(|why| format!(" ({why})")).unwrap_or_default();
        format!("flashcore {} on {on}{why}, seed {}", self.flashcore, self.seed)
    }
}

impl Board {
    fn read(info: &DeviceInfo) -> Option<Self> {
        with_nvml(info, |nvml, device| Self {
            driver: nvml.sys_driver_version().unwrap_or_default(),
            uuid_hash: device.uuid().ok().map(|uuid| crate::bundle::sha256_hex(uuid.as_bytes())[..16].to_owned()),
            power_cap_w: device.enforced_power_limit().ok().map(watts),
            ecc: device.is_ecc_enabled().ok().map(|ecc| ecc.currently_enabled),
            mig: device.mig_mode().ok().map(|mig| mig.current != 0),
            max_clocks_mhz: [Clock::SM, Clock::Memory].map(|clock| device.max_clock_info(clock).ok()),
        })
    }
}

impl State {
    /// Of a runtime's card, now.
    pub fn read(runtime: &Runtime) -> Option<Self> {
        with_nvml(runtime.device_info()?, |_, device| Self {
            clocks_mhz: [Clock::SM, Clock::Memory].map(|clock| device.clock_info(clock).ok()),
            temperature_c: device.temperature(TemperatureSensor::Gpu).ok(),
            power_w: device.power_usage().ok().map(watts),
            throttle_reasons: device
                .current_throttle_reasons()
                .map(|reasons| reasons.iter_names().map(|(name, _)| name.to_lowercase()).collect())
                .unwrap_or_default(),
        })
    }
}

fn watts(milliwatts: u32) -> f64 {
    f64::from(milliwatts) / 1e3
}

/// Asks the management library about a device, if there is one and it counts devices as the driver does.
fn with_nvml<T>(info: &DeviceInfo, ask: impl FnOnce(&Nvml, &nvml_wrapper::Device<'_>) -> T) -> Option<T> {
    let nvml = Nvml::builder().lib_path("libnvidia-ml.so.1".as_ref()).init().or_else(|_| Nvml::init()).ok()?;
    let device = nvml.device_by_index(info.ordinal).ok()?;
    (device.name().ok()? == info.name).then(|| ask(&nvml, &device))
}

#[cfg(feature = "cuda")]
fn embedded(arch: &str) -> Option<&'static [u8]> {
    crate::bundle::embedded().iter().find(|(name, _)| *name == arch).map(|(_, bytes)| *bytes)
}

#[cfg(not(feature = "cuda"))]
fn embedded(_: &str) -> Option<&'static [u8]> {
    None
}

fn processor() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    name.map_or_else(|| std::env::consts::ARCH.into(), |(_, name)| name.trim().into())
}
