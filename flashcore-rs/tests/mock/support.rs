//! Runtimes on the mock, and calls that run both there and on the CPU backend.

use std::sync::Arc;

use flashcore::bundle::Bundle;
use flashcore::testing::{self, MockConfig, MockDriver};
use flashcore::{
    AttentionOptions, DType, DeviceBuffer, Result, Runtime, RuntimeBuilder, Stream, TensorView, TensorViewMut,
};
use half::{bf16, f16};
use proptest::prelude::ProptestConfig;
use serde_json::{Value, json};

use crate::workload::noise;

/// How many cases a property is tried on; at most `FLASHCORE_TEST_CASES` where an interpreter or Valgrind runs them.
pub fn cases(cases: u32) -> ProptestConfig {
    let limit = std::env::var("FLASHCORE_TEST_CASES").ok().and_then(|limit| limit.parse().ok());
    let limit = limit.unwrap_or(if cfg!(miri) { 2 } else { u32::MAX });
    ProptestConfig { cases: cases.min(limit), failure_persistence: None, ..ProptestConfig::default() }
}

/// A mock with one device, and a runtime on it with the sample bundle.
pub fn mock() -> (Arc<MockDriver>, Runtime) {
    let driver = Arc::new(MockDriver::default());
    let runtime = runtime(&driver, 0).expect("a runtime on the mock");
    (driver, runtime)
}

/// A runtime on a device of the mock, with the sample bundle.
pub fn runtime(driver: &Arc<MockDriver>, ordinal: u32) -> Result<Runtime> {
    with_bundle(driver, Runtime::builder().ordinal(ordinal), testing::sample_bundle())
}

/// A runtime on the mock with a bundle whose code the mock knows.
pub fn with_bundle(driver: &Arc<MockDriver>, builder: RuntimeBuilder, bundle: Vec<u8>) -> Result<Runtime> {
    driver.learn(Bundle::parse(&bundle)?.manifest());
    testing::with_bundle(builder, driver, bundle).build()
}

/// The sample bundle with two launches per variant that share scratch memory.
pub fn two_launches() -> Vec<u8> {
    let (mut manifest, code) = testing::sample();
    for variant in manifest["variants"].as_array_mut().expect("variants") {
        variant["workspace"] = json!([{"bytes": ["num_heads_q", 100]}, {"bytes": [7]}]);
        let mut launch = variant["launches"][0].clone();
        let params = launch["params"].as_array_mut().expect("params");
        params.push(json!({"kind": "ptr", "value": "workspace.1"}));
        variant["launches"] = json!([launch.clone(), launch]);
    }
    testing::pack(manifest.to_string().as_bytes(), &code)
}

/// The sample bundle, but with tiles of 16 keys in the variants with tensor maps, which go to up to four parts where tiles
/// of queries are few; fewer than 20 keys are not for these variants.
pub fn split_keys() -> Vec<u8> {
    let (manifest, code) = split_sample();
    testing::pack(manifest.to_string().as_bytes(), &code)
}

/// The manifest of [`split_keys`], and its code section.
pub fn split_sample() -> (Value, Vec<u8>) {
    let (mut manifest, code) = testing::sample();
    let variants = manifest["variants"].as_array_mut().expect("variants");
    for variant in variants.iter_mut().filter(|variant| variant["family"] == "hopper") {
        variant["when"]["limits"] = json!({"seq_len_k": [20, 1 << 30]});
        variant["tile"]["key"] = json!(16);
        variant["max_key_splits"] = json!(4);
        variant["workspace"] = json!([{"bytes": ["batch", "num_heads_q", "key_splits", "seq_len_q", 4 * 257]}]);
        let mut parts = variant["launches"][0].clone();
        parts["grid"]["x"] = json!(["num_tiles", "key_splits"]);
        let params = parts["params"].as_array_mut().expect("params");
        params.iter_mut().filter(|param| param["value"] == "lse").for_each(|lse| lse["value"] = json!("workspace.0"));
        params.push(json!({"kind": "i32", "value": "key_splits"}));
        let mut whole = variant["launches"][0].clone();
        whole["kernel"] = json!("attention_combine");
        whole["grid"] = json!({"x": ["num_tiles", 4], "y": [], "z": [], "max_ctas_per_sm": null});
        let pointers = ["workspace.0", "out", "lse"].map(|name| json!({"kind": "ptr", "value": name}));
        let sizes = ["num_tiles", "tiles_query", "seq_len_q", "head_dim_v", "key_splits"];
        let sizes = sizes.map(|name| json!({"kind": "i32", "value": name}));
        whole["params"] = pointers.into_iter().chain(sizes).collect();
        variant["launches"] = json!([parts, whole]);
    }
    (manifest, code)
}

/// The sample bundle with two builds of its first kernel: tiles of 64 queries, for up to four of them and 99 queries; and
/// of 128, for more queries.
pub fn tuned() -> Vec<u8> {
    let (mut manifest, code) = testing::sample();
    let variants = manifest["variants"].as_array_mut().expect("variants");
    let mut large = variants[0].clone();
    variants[0]["when"]["limits"] = json!({"seq_len_q": [1, 99], "num_tiles": [1, 4]});
    large["name"] = json!("large");
    large["tile"]["query"] = json!(128);
    large["launches"][0]["kernel"] = json!("large");
    large["when"]["limits"] = json!({"seq_len_q": [100, 1 << 30]});
    variants.push(large);
    testing::pack(manifest.to_string().as_bytes(), &code)
}

/// A mock with devices of these compute capabilities.
pub fn devices(capabilities: &[(u32, u32)]) -> Arc<MockDriver> {
    let devices = (0..).zip(capabilities).map(|(ordinal, &capability)| MockConfig::device(ordinal, capability));
    Arc::new(MockDriver::new(MockConfig { devices: devices.collect(), ..MockConfig::default() }))
}

/// Asserts that no rule was broken.
#[track_caller]
pub fn assert_sound(driver: &MockDriver) {
    assert_eq!(driver.violations(), Vec::<String>::new());
}

#[derive(Clone, Debug)]
enum Data {
    F16(Vec<f16>),
    BF16(Vec<bf16>),
    F32(Vec<f32>),
    Bool(Vec<u8>),
}

/// A tensor in host memory with any layout.
#[derive(Clone, Debug)]
pub struct Operand {
    data: Data,
    pub shape: [usize; 4],
    pub strides: [i64; 4],
    /// Elements before the first.
    pub offset: usize,
}

/// How an operand lies in memory.
#[derive(Clone, Copy, Debug)]
pub struct Form {
    /// Of batch, head and seq: the outermost first.
    pub order: [usize; 3],
    /// Elements after each row.
    pub padding: usize,
    /// Elements before the first row.
    pub offset: usize,
}

impl Form {
    pub const CONTIGUOUS: Self = Self { order: [0, 1, 2], padding: 0, offset: 0 };
}

impl Operand {
    pub fn new(dtype: DType, shape: [usize; 4], form: Form, seed: u64) -> Self {
        let mut strides = [1; 4];
        let mut stride = shape[3] + form.padding;
        for dim in form.order.into_iter().rev() {
            strides[dim] = stride as i64;
            stride *= shape[dim];
        }
        Self::with_strides(dtype, shape, strides, form.offset, seed)
    }

    pub fn with_strides(dtype: DType, shape: [usize; 4], strides: [i64; 4], offset: usize, seed: u64) -> Self {
        let last: usize = shape.iter().zip(&strides).map(|(&n, &stride)| n.saturating_sub(1) * stride as usize).sum();
        let extent = if shape.contains(&0) { 0 } else { last + 1 };
        let numbers = noise(offset + extent, seed);
        let data = match dtype {
            DType::F16 => Data::F16(numbers),
            DType::BF16 => Data::BF16(numbers.iter().map(|x| bf16::from_f32(x.to_f32())).collect()),
            DType::F32 => Data::F32(numbers.iter().map(|x| x.to_f32()).collect()),
            _ => Data::Bool(numbers.iter().map(|x| u8::from(x.to_f32() > -0.5) * 3).collect()),
        };
        Self { data, shape, strides, offset }
    }

    /// Overwrites everything, gaps too, with ones in every bit: NaN.
    pub fn poison(mut self) -> Self {
        match &mut self.data {
            Data::F16(data) => data.fill(f16::from_bits(!0)),
            Data::BF16(data) => data.fill(bf16::from_bits(!0)),
            Data::F32(data) => data.fill(f32::from_bits(!0)),
            Data::Bool(data) => data.fill(!0),
        }
        self
    }

    fn is_poison(&self) -> bool {
        match &self.data {
            Data::F16(data) => data.iter().all(|x| x.to_bits() == !0),
            Data::BF16(data) => data.iter().all(|x| x.to_bits() == !0),
            Data::F32(data) => data.iter().all(|x| x.to_bits() == !0),
            Data::Bool(data) => data.iter().all(|&x| x == !0),
        }
    }

    pub fn dtype(&self) -> DType {
        match self.data {
            Data::F16(_) => DType::F16,
            Data::BF16(_) => DType::BF16,
            Data::F32(_) => DType::F32,
            Data::Bool(_) => DType::Bool,
        }
    }

    pub fn view(&self) -> Result<TensorView<'_>> {
        let (shape, strides, offset) = (&self.shape, &self.strides, self.offset);
        match &self.data {
            Data::F16(data) => TensorView::from_slice_strided(&data[offset..], shape, strides),
            Data::BF16(data) => TensorView::from_slice_strided(&data[offset..], shape, strides),
            Data::F32(data) => TensorView::from_slice_strided(&data[offset..], shape, strides),
            Data::Bool(data) => TensorView::from_slice_strided(&data[offset..], shape, strides),
        }
    }

    pub fn view_mut(&mut self) -> Result<TensorViewMut<'_>> {
        let (shape, strides, offset) = (&self.shape, &self.strides, self.offset);
        match &mut self.data {
            Data::F16(data) => TensorViewMut::from_slice_strided(&mut data[offset..], shape, strides),
            Data::BF16(data) => TensorViewMut::from_slice_strided(&mut data[offset..], shape, strides),
            Data::F32(data) => TensorViewMut::from_slice_strided(&mut data[offset..], shape, strides),
            Data::Bool(data) => TensorViewMut::from_slice_strided(&mut data[offset..], shape, strides),
        }
    }

    pub fn upload(&self, stream: &Stream) -> Result<DeviceBuffer> {
        match &self.data {
            Data::F16(data) => DeviceBuffer::from_slice(stream, data),
            Data::BF16(data) => DeviceBuffer::from_slice(stream, data),
            Data::F32(data) => DeviceBuffer::from_slice(stream, data),
            Data::Bool(data) => DeviceBuffer::from_slice(stream, data),
        }
    }

    pub fn on<'a>(&self, buffer: &'a DeviceBuffer) -> Result<TensorView<'a>> {
        TensorView::from_buffer_strided(buffer, self.dtype(), &self.shape, &self.strides, self.offset)
    }

    pub fn on_mut<'a>(&self, buffer: &'a mut DeviceBuffer) -> Result<TensorViewMut<'a>> {
        TensorViewMut::from_buffer_strided(buffer, self.dtype(), &self.shape, &self.strides, self.offset)
    }

    fn download(&mut self, buffer: &DeviceBuffer) -> Result<()> {
        match &mut self.data {
            Data::F16(data) => *data = buffer.to_vec()?,
            Data::BF16(data) => *data = buffer.to_vec()?,
            Data::F32(data) => *data = buffer.to_vec()?,
            Data::Bool(data) => *data = buffer.to_vec()?,
        }
        Ok(())
    }

    /// Everything in memory, gaps too.
    fn numbers(&self) -> Vec<f32> {
        match &self.data {
            Data::F16(data) => data.iter().map(|x| x.to_f32()).collect(),
            Data::BF16(data) => data.iter().map(|x| x.to_f32()).collect(),
            Data::F32(data) => data.clone(),
            Data::Bool(data) => data.iter().map(|&x| x.into()).collect(),
        }
    }
}

/// A whole call in host memory.
#[derive(Clone, Debug)]
pub struct Call {
    pub query: Operand,
    pub key: Operand,
    pub value: Operand,
    pub attn_mask: Option<Operand>,
    pub out: Operand,
    pub lse: Option<Operand>,
    pub options: AttentionOptions,
}

impl Call {
    pub fn new(dtype: DType, q: [usize; 4], kv: [usize; 4], dim_v: usize) -> Self {
        let operand = |shape, seed| Operand::new(dtype, shape, Form::CONTIGUOUS, seed);
        Self {
            query: operand(q, 1),
            key: operand(kv, 2),
            value: operand([kv[0], kv[1], kv[2], dim_v], 3),
            attn_mask: None,
            out: operand([q[0], q[1], q[2], dim_v], 4).poison(),
            lse: None,
            options: AttentionOptions::default(),
        }
    }

    pub fn with_lse(mut self) -> Self {
        let [batch, heads, seq, _] = self.query.shape;
        self.lse = Some(Operand::new(DType::F32, [batch, heads, seq, 1], Form::CONTIGUOUS, 5).poison());
        self
    }

    /// Runs on the CPU backend.
    pub fn on_cpu(&mut self) -> Result<()> {
        let mask = self.attn_mask.as_ref().map(Operand::view).transpose()?;
        let mut lse = self.lse.as_mut().map(Operand::view_mut).transpose()?;
        let views = [self.query.view()?, self.key.view()?, self.value.view()?];
        launch(&Runtime::cpu(), None, views, mask, self.options, &mut self.out.view_mut()?, lse.as_mut())
    }

    /// Runs on a device, from and to buffers that are just large enough.
    pub fn on_device(&mut self, runtime: &Runtime) -> Result<()> {
        let stream = runtime.stream()?;
        let upload = |operand: &Operand| operand.upload(stream);
        let inputs = [upload(&self.query)?, upload(&self.key)?, upload(&self.value)?];
        let mask_buffer = self.attn_mask.as_ref().map(upload).transpose()?;
        let mut out_buffer = upload(&self.out)?;
        let mut lse_buffer = self.lse.as_ref().map(upload).transpose()?;
        let [q, k, v] = &inputs;
        let views = [self.query.on(q)?, self.key.on(k)?, self.value.on(v)?];
        let mask = self.attn_mask.as_ref().zip(mask_buffer.as_ref()).map(|(mask, buffer)| mask.on(buffer));
        let lse = self.lse.as_ref().zip(lse_buffer.as_mut()).map(|(lse, buffer)| lse.on_mut(buffer));
        let mut out = self.out.on_mut(&mut out_buffer)?;
        let mut lse = lse.transpose()?;
        let ran = launch(runtime, None, views, mask.transpose()?, self.options, &mut out, lse.as_mut());
        // Also after a refusal, to see that nothing was written.
        self.out.download(&out_buffer)?;
        if let (Some(lse), Some(buffer)) = (&mut self.lse, &lse_buffer) {
            lse.download(buffer)?;
        }
        ran
    }

    /// Asserts that both the CPU backend and a device refuse the call with this message, and write nothing.
    #[track_caller]
    pub fn assert_refused(&self, message: &str) {
        let (driver, runtime) = mock();
        let (mut cpu, mut device) = (self.clone(), self.clone());
        let refused = [cpu.on_cpu(), device.on_device(&runtime)];
        for (refused, after) in refused.into_iter().zip([cpu, device]) {
            assert_eq!(refused.expect_err("a refusal").to_string(), message);
            let outputs = [Some(&after.out), after.lse.as_ref()];
            assert!(outputs.iter().flatten().all(|output| output.is_poison()), "{message}: something was written");
        }
        assert_eq!((driver.launches(), driver.violations()), (vec![], vec![]));
    }

    /// Runs on both, and asserts that outputs agree and that the gaps between their rows are untouched.
    #[track_caller]
    pub fn assert_same(&self, runtime: &Runtime) {
        let (mut cpu, mut device) = (self.clone(), self.clone());
        cpu.on_cpu().expect("a call for the CPU");
        device.on_device(runtime).expect("a call for the device");
        assert_close(&device.out, &cpu.out);
        if let (Some(device), Some(cpu)) = (&device.lse, &cpu.lse) {
            assert_close(device, cpu);
        }
    }
}

fn launch(
    runtime: &Runtime,
    stream: Option<&Stream>,
    [query, key, value]: [TensorView<'_>; 3],
    mask: Option<TensorView<'_>>,
    options: AttentionOptions,
    out: &mut TensorViewMut<'_>,
    lse: Option<&mut TensorViewMut<'_>>,
) -> Result<()> {
    let mut call = runtime.attention(&query, &key, &value).options(options);
    if let Some(mask) = mask {
        call = call.attn_mask(mask);
    }
    if let Some(stream) = stream {
        call = call.on(stream);
    }
    match lse {
        Some(lse) => call.run_with_lse(out, lse),
        None => call.run(out),
    }
}

#[track_caller]
fn assert_close(got: &Operand, expected: &Operand) {
    let tolerance = if got.dtype() == DType::BF16 { 1e-2 } else { 2e-3 };
    for (i, (got, expected)) in got.numbers().iter().zip(expected.numbers()).enumerate() {
        let same = got.to_bits() == expected.to_bits() || (got - expected).abs() <= tolerance;
        assert!(same, "element {i}: {got} instead of {expected}");
    }
}
