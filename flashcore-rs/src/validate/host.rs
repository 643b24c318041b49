//! Tensors in host memory with a poisoned rim: what inputs are drawn into and outputs are compared in.
//!
//! Every element that is not part of the tensor (rim, padding of rows) holds a NaN. In an input it is a quiet one: a
//! kernel that computes with it shows. In an output it is a signalling one, which no arithmetic produces, so that both an
//! element that was not written and one that should not have been are found by its bits.

use std::cmp::Reverse;
use std::ops::Range;

use half::{bf16, f16};
use serde::Serialize;

use super::case::Memory;
use crate::device::{DeviceBuffer, Stream};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::tensor::{HostElement, Layout, TensorView, TensorViewMut};

/// Elements of rim on either side; a multiple of 256 bytes for two-byte types, so that the base address stays aligned.
const RIM: usize = 128;
/// Tensors larger than this repeat their first elements; the period is odd, so an offset that wraps at a power of two
/// still reads something else.
const DRAWN: usize = (1 << 25) - 1;

/// What poison is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Poison {
    Input,
    Output,
}

/// An element type with its poisons.
trait Cell: HostElement {
    const INPUT: Self;
    const OUTPUT: Self;

    fn from_f32(x: f32) -> Self;
    /// Exact, but for f64.
    fn to_f32(self) -> f32;
    fn bits(self) -> u64;
    fn bytes(self) -> Vec<u8>;

    fn poison(poison: Poison) -> Self {
        match poison {
            Poison::Input => Self::INPUT,
            Poison::Output => Self::OUTPUT,
        }
    }

    fn is_output_poison(self) -> bool {
        self.bits() == Self::OUTPUT.bits()
    }
}

macro_rules! cells {
    ($($variant:ident: $ty:ty, $input:expr, $output:expr, $from:expr, $to:expr, $bits:expr;)*) => {
        /// The memory of a tensor, by element type.
        #[derive(Clone, Debug)]
        enum Data { $($variant(Vec<$ty>)),* }

        $(impl Cell for $ty {
            const INPUT: Self = $input;
            const OUTPUT: Self = $output;

            fn from_f32(x: f32) -> Self {
                ($from)(x)
            }

            fn to_f32(self) -> f32 {
                ($to)(self)
            }

            fn bits(self) -> u64 {
                ($bits)(self)
            }

            fn bytes(self) -> Vec<u8> {
                self.to_le_bytes().to_vec()
            }
        })*

        impl Data {
            fn filled(dtype: DType, len: usize, poison: Poison) -> Self {
                match dtype { $(DType::$variant => Self::$variant(vec![<$ty>::poison(poison); len])),* }
            }
        }

        /// Runs an expression with the typed vector.
        macro_rules! each {
            ($data:expr, $vec:ident => $body:expr) => {
                match $data { $(Data::$variant($vec) => $body),* }
            };
        }

        /// Runs an expression with two typed vectors that must be of the same type.
        macro_rules! both {
            ($one:expr, $two:expr, ($x:ident, $y:ident) => $body:expr, else $other:expr) => {
                match ($one, $two) { $((Data::$variant($x), Data::$variant($y)) => $body,)* _ => $other }
            };
        }
    };
}

cells! {
    F16: f16, f16::from_bits(0x7e01), f16::from_bits(0x7d5a), f16::from_f32, f16::to_f32, |x: f16| x.to_bits().into();
    BF16: bf16, bf16::from_bits(0x7fc1), bf16::from_bits(0x7fa5), bf16::from_f32, bf16::to_f32, |x: bf16| x.to_bits().into();
    F32: f32, f32::from_bits(0x7fc0_0001), f32::from_bits(0x7fa5_a5a5), |x| x, |x| x, |x: f32| x.to_bits().into();
    F64: f64, f64::from_bits(0x7ff8 << 48 | 1), f64::from_bits(0x7ff5_a5a5 << 32), f64::from, |x| x as f32, f64::to_bits;
    Bool: u8, 1, 0xa5, |x| u8::from(x != 0.0), f32::from, |x: u8| x.into();
}

/// A tensor in host memory.
#[derive(Clone, Debug)]
pub struct HostTensor {
    layout: Layout,
    /// Element of the memory that the view starts at.
    start: usize,
    data: Data,
}

/// What happened around and in an output.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Damage {
    /// Elements outside the tensor that were written.
    pub outside: usize,
    /// Elements of the tensor that were not.
    pub unwritten: usize,
}

impl HostTensor {
    /// An input, all poison until it is drawn.
    ///
    /// # Errors
    /// As [`Layout::new`].
    pub fn input(dtype: DType, shape: [usize; 4], memory: Memory) -> Result<Self> {
        Self::new(dtype, shape, memory, Poison::Input)
    }

    /// An output, all poison.
    ///
    /// # Errors
    /// As [`Layout::new`].
    pub fn output(dtype: DType, shape: [usize; 4], memory: Memory) -> Result<Self> {
        Self::new(dtype, shape, memory, Poison::Output)
    }

    fn new(dtype: DType, shape: [usize; 4], memory: Memory, poison: Poison) -> Result<Self> {
        let layout = memory.layout(dtype, shape)?;
        let start = RIM + memory.offset;
        Ok(Self { layout, start, data: Data::filled(dtype, start + layout.extent() + RIM, poison) })
    }

    /// Shape, strides and element type.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Element of [`HostTensor::bytes`] that the tensor starts at.
    pub fn start(&self) -> usize {
        self.start
    }

    /// Writes every element, in order of its index.
    pub fn draw(&mut self, mut next: impl FnMut([usize; 4]) -> f32) {
        let Layout { shape: [batch, heads, seq, dim], strides, .. } = self.layout;
        if self.layout.is_empty() {
            return;
        }
        let index = (0..batch).flat_map(|b| (0..heads).flat_map(move |h| (0..seq).map(move |i| [b, h, i])));
        let contiguous = self.layout.strides == [heads * seq * dim, seq * dim, dim, 1].map(|stride| stride as i64);
        let drawn = if contiguous { DRAWN } else { usize::MAX };
        each!(&mut self.data, data => {
            for [b, h, i] in index.take(drawn.div_ceil(dim)) {
                let first = self.start + offset(strides, [b, h, i]);
                for (d, x) in data[first..first + dim].iter_mut().enumerate() {
                    *x = Cell::from_f32(next([b, h, i, d]));
                }
            }
            if contiguous {
                let end = self.start + self.layout.len();
                for first in (self.start + DRAWN..end).step_by(DRAWN) {
                    data.copy_within(self.start..self.start + DRAWN.min(end - first), first);
                }
            }
        });
    }

    /// One element; an index along a dimension of size 1 counts as 0, so that a mask broadcasts.
    ///
    /// # Panics
    /// When the index lies outside the memory.
    pub fn get(&self, index: [usize; 4]) -> f32 {
        let Layout { shape, strides, .. } = self.layout;
        let at = |dim: usize| if shape[dim] == 1 { 0 } else { index[dim] };
        let element = self.start + offset(strides, [at(0), at(1), at(2)]) + at(3);
        each!(&self.data, data => data[element].to_f32())
    }

    /// Overwrites one element.
    pub fn set(&mut self, index: [usize; 4], x: f32) {
        let at = self.start + offset(self.layout.strides, [index[0], index[1], index[2]]) + index[3];
        each!(&mut self.data, data => data[at] = Cell::from_f32(x));
    }

    /// Overwrites one element of the memory, in the tensor or around it; there is none beyond the rim.
    pub(super) fn poke(&mut self, element: usize, x: f32) {
        each!(&mut self.data, data => data.get_mut(element).into_iter().for_each(|to| *to = Cell::from_f32(x)));
    }

    /// The whole tensor.
    ///
    /// # Errors
    /// None for a tensor made here; the signature is that of the views.
    pub fn view(&self) -> Result<TensorView<'_>> {
        let Layout { shape, strides, .. } = &self.layout;
        each!(&self.data, data => TensorView::from_slice_strided(&data[self.start..], shape, strides))
    }

    /// The whole tensor, writable.
    ///
    /// # Errors
    /// As [`HostTensor::view`].
    pub fn view_mut(&mut self) -> Result<TensorViewMut<'_>> {
        let Layout { shape, strides, .. } = &self.layout;
        each!(&mut self.data, data => TensorViewMut::from_slice_strided(&mut data[self.start..], shape, strides))
    }

    /// One head, as a tensor of batch 1 and 1 head. Dimensions that broadcast have one entry for all.
    ///
    /// # Errors
    /// As [`HostTensor::view`].
    pub fn head(&self, batch: usize, head: usize) -> Result<TensorView<'_>> {
        let Layout { shape, strides, .. } = self.layout;
        let first = self.start + offset(strides, [batch % shape[0], head % shape[1], 0]);
        each!(&self.data, data => {
            TensorView::from_slice_strided(&data[first..], &[1, 1, shape[2], shape[3]], &strides)
        })
    }

    /// A copy of the memory on a device.
    ///
    /// # Errors
    /// As [`DeviceBuffer::from_slice`].
    pub fn upload(&self, stream: &Stream) -> Result<DeviceBuffer> {
        each!(&self.data, data => DeviceBuffer::from_slice(stream, data))
    }

    /// Copies the memory into one that was uploaded before.
    ///
    /// # Errors
    /// As [`DeviceBuffer::overwrite`].
    pub(super) fn overwrite(&self, buffer: &mut DeviceBuffer) -> Result<()> {
        each!(&self.data, data => buffer.overwrite(data))
    }

    /// The tensor in a copy of the memory.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] when the buffer is no such copy.
    pub fn on_device<'a>(&self, buffer: &'a DeviceBuffer) -> Result<TensorView<'a>> {
        let Layout { dtype, shape, strides } = &self.layout;
        TensorView::from_buffer_strided(buffer, *dtype, shape, strides, self.start)
    }

    /// The tensor in a copy of the memory, writable.
    ///
    /// # Errors
    /// As [`HostTensor::on_device`].
    pub fn on_device_mut<'a>(&self, buffer: &'a mut DeviceBuffer) -> Result<TensorViewMut<'a>> {
        let Layout { dtype, shape, strides } = &self.layout;
        TensorViewMut::from_buffer_strided(buffer, *dtype, shape, strides, self.start)
    }

    /// Takes the memory back from a device.
    ///
    /// # Errors
    /// As [`DeviceBuffer::to_vec`].
    pub fn download(&mut self, buffer: &DeviceBuffer) -> Result<()> {
        each!(&mut self.data, data => {
            if size_of_val(data.as_slice()) != buffer.len() {
                return Err(Error::invalid("buffer", buffer.len(), format!("{} bytes", size_of_val(data.as_slice()))));
            }
            *data = buffer.to_vec()?;
        });
        Ok(())
    }

    /// Compares an output with the poison it was made of.
    pub fn damage(&self) -> Damage {
        let dim = self.layout.shape[3];
        each!(&self.data, data => {
            let poisoned = |range: Range<usize>| {
                data[range].iter().filter(|x| x.is_output_poison()).count()
            };
            let mut damage = Damage::default();
            let mut end = 0;
            for row in self.rows_by_address() {
                damage.outside += row - end - poisoned(end..row);
                end = row + dim;
                damage.unwritten += poisoned(row..end);
            }
            damage.outside += data.len() - end - poisoned(end..data.len());
            damage
        })
    }

    /// Where rows of head_dim start, in ascending order. (An output does not overlap itself.)
    fn rows_by_address(&self) -> impl Iterator<Item = usize> + use<> {
        let Layout { shape, strides, .. } = self.layout;
        let mut dims = [0, 1, 2];
        dims.sort_by_key(|&dim| Reverse(strides[dim]));
        let [n0, n1, n2] = dims.map(|dim| if self.layout.is_empty() { 0 } else { shape[dim] });
        let [s0, s1, s2] = dims.map(|dim| strides[dim] as usize);
        let start = self.start;
        (0..n0).flat_map(move |i| (0..n1).flat_map(move |j| (0..n2).map(move |k| start + i * s0 + j * s1 + k * s2)))
    }

    /// Whether two memories are equal bit by bit, rim and padding included.
    pub fn same_bits(&self, other: &Self) -> bool {
        both!(&self.data, &other.data, (x, y) => {
            x.len() == y.len() && x.iter().zip(y).all(|(x, y)| x.bits() == y.bits())
        }, else false)
    }

    /// The whole memory as f32: exact, but for f64.
    pub(super) fn memory(&self) -> Vec<f32> {
        each!(&self.data, data => data.iter().map(|x| x.to_f32()).collect())
    }

    /// The whole memory, little endian.
    pub fn bytes(&self) -> Vec<u8> {
        each!(&self.data, data => data.iter().flat_map(|x| x.bytes()).collect())
    }

    /// The elements of a contiguous f32 tensor.
    pub(super) fn as_f32(&self) -> &[f32] {
        match &self.data {
            Data::F32(data) => &data[self.start..self.start + self.layout.extent()],
            _ => &[],
        }
    }
}

fn offset(strides: [i64; 4], index: [usize; 3]) -> usize {
    strides.iter().zip(index).map(|(&stride, i)| stride as usize * i).sum()
}
