//! Inference in small: a decoder of two layers reads a prompt at once (prefill), then generates token by token, each one
//! attending to the keys and values that the layers have cached.
//!
//! The weights are random, so the tokens mean nothing; the attention is real, grouped (4 query heads, 2 key/value heads)
//! and causal. Everything but attention is plain loops on the host.
//!
//! ```text
//! cargo run --release -p flashcore-rs --example minimal_inference          # a GPU if there is one, else the CPU
//! cargo run --release -p flashcore-rs --example minimal_inference -- cpu
//! ```
#![allow(clippy::print_stdout, reason = "an example shows its results")]

use flashcore::{CausalAlign, DType, Device, DeviceBuffer, Result, Runtime, TensorView, TensorViewMut};
use half::f16;

const VOCABULARY: usize = 50;
const LAYERS: usize = 2;
const HEADS_Q: usize = 4;
const HEADS_KV: usize = 2;
const HEAD_DIM: usize = 16;
const WIDTH: usize = HEADS_Q * HEAD_DIM;

fn main() -> Result<()> {
    let runtime = match std::env::args().nth(1).as_deref() {
        Some("cpu") => Runtime::cpu(),
        _ => Runtime::auto(),
    };
    println!("attention on {}", runtime.device());
    let model = Model::random();

    let prompt = [3, 14, 15, 9, 26];
    let mut caches = vec![Cache::default(); LAYERS];
    let mut tokens = prompt.to_vec();
    let mut next = model.forward(&runtime, &prompt, &mut caches)?;
    println!("prefill of {prompt:?}: next is {next}");
    for step in 1..=8 {
        tokens.push(next);
        next = model.forward(&runtime, &[next], &mut caches)?;
        println!("step {step}, {} keys: next is {next}", tokens.len());
    }

    // Reading the whole sequence at once must lead to the same token as reading it piece by piece.
    let at_once = model.forward(&runtime, &tokens, &mut vec![Cache::default(); LAYERS])?;
    println!("{tokens:?} at once: next is {at_once}");
    assert_eq!(at_once, next);
    Ok(())
}

/// Keys and values so far, `(seq, heads, head_dim)`.
#[derive(Clone, Default)]
struct Cache {
    key: Vec<f16>,
    value: Vec<f16>,
}

struct Model {
    embedding: Matrix,
    layers: Vec<Layer>,
    unembedding: Matrix,
}

struct Layer {
    query: Matrix,
    key: Matrix,
    value: Matrix,
    out: Matrix,
}

impl Model {
    fn random() -> Self {
        let mut state = 1;
        let mut matrix = |rows, columns| Matrix::random(rows, columns, &mut state);
        let layers = (0..LAYERS).map(|_| Layer {
            query: matrix(WIDTH, WIDTH),
            key: matrix(HEADS_KV * HEAD_DIM, WIDTH),
            value: matrix(HEADS_KV * HEAD_DIM, WIDTH),
            out: matrix(WIDTH, WIDTH),
        });
        let layers = layers.collect();
        Self { embedding: matrix(VOCABULARY, WIDTH), layers, unembedding: matrix(VOCABULARY, WIDTH) }
    }

    /// Reads tokens, adds them to the caches, and returns the likeliest next token.
    fn forward(&self, runtime: &Runtime, tokens: &[usize], caches: &mut [Cache]) -> Result<usize> {
        let mut x: Vec<f32> = tokens.iter().flat_map(|&token| self.embedding.row(token).to_vec()).collect();
        for (layer, cache) in self.layers.iter().zip(caches) {
            let normalised = normalise(&x);
            cache.key.extend(to_half(&layer.key.apply(&normalised)));
            cache.value.extend(to_half(&layer.value.apply(&normalised)));
            let query: Vec<f16> = to_half(&layer.query.apply(&normalised)).collect();
            let attended: Vec<f32> = attend(runtime, &query, cache)?.into_iter().map(f32::from).collect();
            x.iter_mut().zip(layer.out.apply(&attended)).for_each(|(x, change)| *x += change);
        }
        let last = normalise(&x[x.len() - WIDTH..]);
        let logits = self.unembedding.apply(&last);
        let likeliest = logits.iter().enumerate().max_by(|(_, one), (_, other)| one.total_cmp(other));
        Ok(likeliest.map_or(0, |(token, _)| token))
    }
}

/// Attention of new queries, the last of which is at the last key, over a cache.
fn attend(runtime: &Runtime, query: &[f16], cache: &Cache) -> Result<Vec<f16>> {
    // The memory is (seq, heads, head_dim); strides present it as (batch, heads, seq, head_dim) without a copy.
    let view = |elements: usize, heads: usize| {
        let strides = [elements as i64, HEAD_DIM as i64, (heads * HEAD_DIM) as i64, 1];
        ([1, heads, elements / (heads * HEAD_DIM), HEAD_DIM], strides)
    };
    let (shape_q, strides_q) = view(query.len(), HEADS_Q);
    let (shape_kv, strides_kv) = view(cache.key.len(), HEADS_KV);
    match runtime.device() {
        Device::Cpu => {
            let mut out = vec![f16::ZERO; query.len()];
            let query = TensorView::from_slice_strided(query, &shape_q, &strides_q)?;
            let key = TensorView::from_slice_strided(&cache.key, &shape_kv, &strides_kv)?;
            let value = TensorView::from_slice_strided(&cache.value, &shape_kv, &strides_kv)?;
            let mut out_view = TensorViewMut::from_slice_strided(&mut out, &shape_q, &strides_q)?;
            run(runtime, [query, key, value], &mut out_view)?;
            Ok(out)
        }
        Device::Cuda(_) => {
            // A real engine would keep the cache on the device; here it is uploaded for every call.
            let stream = runtime.stream()?;
            let [q, k, v] = [query, &cache.key, &cache.value].map(|data| DeviceBuffer::from_slice(stream, data));
            let (q, k, v) = (q?, k?, v?);
            let mut out = DeviceBuffer::uninit(stream, size_of_val(query))?;
            let query = TensorView::from_buffer_strided(&q, DType::F16, &shape_q, &strides_q, 0)?;
            let key = TensorView::from_buffer_strided(&k, DType::F16, &shape_kv, &strides_kv, 0)?;
            let value = TensorView::from_buffer_strided(&v, DType::F16, &shape_kv, &strides_kv, 0)?;
            let mut out_view = TensorViewMut::from_buffer_strided(&mut out, DType::F16, &shape_q, &strides_q, 0)?;
            run(runtime, [query, key, value], &mut out_view)?;
            out.to_vec()
        }
    }
}

fn run(runtime: &Runtime, [query, key, value]: [TensorView<'_>; 3], out: &mut TensorViewMut<'_>) -> Result<()> {
    runtime.attention(&query, &key, &value).causal(true).causal_align(CausalAlign::BottomRight).run(out)
}

/// A matrix in rows.
struct Matrix {
    columns: usize,
    data: Vec<f32>,
}

impl Matrix {
    /// Weights from a linear congruential generator, scaled so that activations keep their size.
    fn random(rows: usize, columns: usize, state: &mut u64) -> Self {
        let mut draw = || {
            *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (*state >> 40) as f32 / (1 << 23) as f32 - 1.0
        };
        let scale = (3.0 / columns as f32).sqrt();
        Self { columns, data: (0..rows * columns).map(|_| draw() * scale).collect() }
    }

    fn row(&self, row: usize) -> &[f32] {
        &self.data[row * self.columns..][..self.columns]
    }

    /// Multiplies every row of `x`.
    fn apply(&self, x: &[f32]) -> Vec<f32> {
        let dot = |x: &[f32], weights: &[f32]| x.iter().zip(weights).map(|(x, w)| x * w).sum();
        x.chunks(self.columns).flat_map(|x| self.data.chunks(self.columns).map(move |row| dot(x, row))).collect()
    }
}

/// Root-mean-square normalisation of every token.
fn normalise(x: &[f32]) -> Vec<f32> {
    let mut x = x.to_vec();
    for token in x.chunks_mut(WIDTH) {
        let mean = token.iter().map(|x| x * x).sum::<f32>() / WIDTH as f32;
        token.iter_mut().for_each(|x| *x /= (mean + 1e-6).sqrt());
    }
    x
}

fn to_half(x: &[f32]) -> impl Iterator<Item = f16> {
    x.iter().map(|&x| f16::from_f32(x))
}
