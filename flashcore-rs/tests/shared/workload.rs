//! One attention call with known inputs and outputs, for runtimes on a GPU or on the mock.

use flashcore::{DType, DeviceBuffer, Result, Runtime, Stream, TensorView, TensorViewMut};
use half::f16;

/// Inputs of one shape, and the output that the CPU backend gives.
pub struct Workload {
    pub shape: [usize; 4],
    pub query: Vec<f16>,
    pub key: Vec<f16>,
    pub value: Vec<f16>,
    pub expected: Vec<f16>,
}

/// The buffers of a call's inputs.
pub struct Inputs(pub [DeviceBuffer; 3]);

impl Workload {
    pub fn new(shape: [usize; 4], seed: u64) -> Result<Self> {
        let len = shape.iter().product();
        let [query, key, value] = [1, 2, 3].map(|i| noise(len, seed * 3 + i));
        let mut expected = vec![f16::ZERO; len];
        Runtime::cpu()
            .attention(
                &TensorView::from_slice(&query, &shape)?,
                &TensorView::from_slice(&key, &shape)?,
                &TensorView::from_slice(&value, &shape)?,
            )
            .causal(true)
            .run(&mut TensorViewMut::from_slice(&mut expected, &shape)?)?;
        Ok(Self { shape, query, key, value, expected })
    }

    pub fn bytes(&self) -> usize {
        self.query.len() * 2
    }

    /// Copies the inputs to buffers at home on these streams.
    pub fn upload(&self, streams: [&Stream; 3]) -> Result<Inputs> {
        let [q, k, v] = streams;
        Ok(Inputs([
            DeviceBuffer::from_slice(q, &self.query)?,
            DeviceBuffer::from_slice(k, &self.key)?,
            DeviceBuffer::from_slice(v, &self.value)?,
        ]))
    }

    /// An output that holds NaN.
    pub fn output(&self, stream: &Stream) -> Result<DeviceBuffer> {
        DeviceBuffer::filled(stream, self.bytes(), 0xff)
    }

    /// Queues the call.
    pub fn run(&self, runtime: &Runtime, stream: &Stream, inputs: &Inputs, out: &mut DeviceBuffer) -> Result<()> {
        self.run_with(runtime, stream, inputs.0.each_ref(), out)
    }

    /// Queues the call with these buffers as query, key and value.
    pub fn run_with(
        &self,
        runtime: &Runtime,
        stream: &Stream,
        [q, k, v]: [&DeviceBuffer; 3],
        out: &mut DeviceBuffer,
    ) -> Result<()> {
        let view = |buffer| TensorView::from_buffer(buffer, DType::F16, &self.shape);
        runtime.attention(&view(q)?, &view(k)?, &view(v)?).causal(true).on(stream).run(&mut TensorViewMut::from_buffer(
            out,
            DType::F16,
            &self.shape,
        )?)
    }

    /// Asserts that a buffer holds the expected output.
    #[track_caller]
    pub fn assert_in(&self, out: &DeviceBuffer) {
        let got = out.to_vec::<f16>().expect("the output");
        for (i, (got, expected)) in got.iter().zip(&self.expected).enumerate() {
            let error = (got.to_f32() - expected.to_f32()).abs();
            assert!(error < 4e-3, "element {i}: {got} instead of {expected}");
        }
    }
}

/// Numbers in -1..1 that look random.
pub fn noise(len: usize, seed: u64) -> Vec<f16> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        f16::from_f32((state >> 40) as f32 / (1 << 23) as f32 - 1.0)
    };
    std::iter::repeat_with(next).take(len).collect()
}
