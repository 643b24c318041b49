//! A decoded launch, computed by the CPU backend on the mock's memory.

use half::{bf16, f16};

use super::decode::Decoded;
use crate::attention::Problem;
use crate::cpu::{self, HostInputs};
use crate::dtype::DType;
use crate::tensor::{HostMut, HostRef};

/// The bytes of the operands of a launch; `out` and `lse` are overwritten.
pub(super) struct Bytes {
    pub(super) query: Vec<u8>,
    pub(super) key: Vec<u8>,
    pub(super) value: Vec<u8>,
    pub(super) attn_mask: Option<Vec<u8>>,
    pub(super) out: Vec<u8>,
    pub(super) lse: Option<Vec<u8>>,
}

/// Computes the problem.
pub(super) fn execute(decoded: &Decoded, bytes: &mut Bytes) {
    let mask = bytes.attn_mask.take().map(|mask| Typed::new(decoded.problem.attn_mask.map(|m| m.dtype), &mask));
    match decoded.problem.dtype {
        DType::BF16 => {
            let [query, key, value] = [&bytes.query, &bytes.key, &bytes.value].map(|b| read(b, bf16::from_le_bytes));
            let mut out = read(&bytes.out, bf16::from_le_bytes);
            let inputs = [HostRef::BF16(&query), HostRef::BF16(&key), HostRef::BF16(&value)];
            run(&decoded.problem, inputs, mask.as_ref(), HostMut::BF16(&mut out), &mut bytes.lse);
            bytes.out = out.iter().flat_map(|x| x.to_le_bytes()).collect();
        }
        _ => {
            let [query, key, value] = [&bytes.query, &bytes.key, &bytes.value].map(|b| read(b, f16::from_le_bytes));
            let mut out = read(&bytes.out, f16::from_le_bytes);
            let inputs = [HostRef::F16(&query), HostRef::F16(&key), HostRef::F16(&value)];
            run(&decoded.problem, inputs, mask.as_ref(), HostMut::F16(&mut out), &mut bytes.lse);
            bytes.out = out.iter().flat_map(|x| x.to_le_bytes()).collect();
        }
    }
}

enum Typed {
    F16(Vec<f16>),
    BF16(Vec<bf16>),
    F32(Vec<f32>),
    Bool(Vec<u8>),
}

impl Typed {
    fn new(dtype: Option<DType>, bytes: &[u8]) -> Self {
        match dtype {
            Some(DType::F16) => Self::F16(read(bytes, f16::from_le_bytes)),
            Some(DType::BF16) => Self::BF16(read(bytes, bf16::from_le_bytes)),
            Some(DType::F32) => Self::F32(read(bytes, f32::from_le_bytes)),
            _ => Self::Bool(bytes.to_vec()),
        }
    }

    fn host(&self) -> HostRef<'_> {
        match self {
            Self::F16(mask) => HostRef::F16(mask),
            Self::BF16(mask) => HostRef::BF16(mask),
            Self::F32(mask) => HostRef::F32(mask),
            Self::Bool(mask) => HostRef::Bool(mask),
        }
    }
}

fn run(problem: &Problem, inputs: [HostRef<'_>; 3], mask: Option<&Typed>, out: HostMut<'_>, lse: &mut Option<Vec<u8>>) {
    let [query, key, value] = inputs;
    let inputs = HostInputs { query, key, value, attn_mask: mask.map(Typed::host) };
    let mut row_sums = lse.as_deref().map(|bytes| read(bytes, f32::from_le_bytes));
    cpu::attention(problem, inputs, out, row_sums.as_deref_mut());
    *lse = row_sums.map(|sums| sums.iter().flat_map(|x| x.to_le_bytes()).collect());
}

fn read<T, const N: usize>(bytes: &[u8], from: fn([u8; N]) -> T) -> Vec<T> {
    let chunks = bytes.chunks_exact(N);
    chunks.map(|chunk| from(chunk.try_into().expect("chunks have this size"))).collect()
}
