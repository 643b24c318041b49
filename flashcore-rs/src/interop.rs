//! Tensors of other libraries, without `unsafe`: slices and streams of `cudarc`, which candle and others build on.
//!
//! ```no_run
//! use flashcore::interop::cudarc::driver::CudaContext;
//! use flashcore::{Runtime, TensorView, TensorViewMut};
//! use half::f16;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let stream = CudaContext::new(0)?.new_stream()?;
//! let (q, k, v) = (stream.alloc_zeros::<f16>(80)?, stream.alloc_zeros::<f16>(80)?, stream.alloc_zeros::<f16>(80)?);
//! let mut out = stream.alloc_zeros::<f16>(80)?;
//! let shape = [1, 2, 5, 8];
//! let runtime = Runtime::cuda(0)?;
//! runtime
//!     .attention(
//!         &TensorView::from_cuda_slice(&q, &shape)?,
//!         &TensorView::from_cuda_slice(&k, &shape)?,
//!         &TensorView::from_cuda_slice(&v, &shape)?,
//!     )
//!     .on(&runtime.cudarc_stream(&stream)?) // the slices' own stream: nothing has to wait
//!     .run(&mut TensorViewMut::from_cuda_slice(&mut out, &shape)?)?;
//! # Ok(())
//! # }
//! ```
//!
//! A call may run on any stream. It waits for the stream that a slice was allocated on (and so for the events that
//! `cudarc` keeps for the slice), and that stream waits for the call; on that very stream there is nothing to wait for.
//! What `cudarc` asks of its users stays theirs: event tracking that was switched off orders nothing between streams.

use std::sync::Arc;

pub use cudarc;
use cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DevicePtrMut};

use crate::device::{Lender, LenderMut, Loan, Stream};
use crate::driver::StreamHandle;
use crate::dtype::Element;
use crate::error::{Error, Result};
use crate::runtime::Runtime;
use crate::tensor::{Layout, Owner, OwnerMut, Storage, StorageMut, TensorView, TensorViewMut, offset_in};

impl<T: Element + std::fmt::Debug> Lender for CudaSlice<T> {
    fn lend(&self) -> Loan<'_> {
        let (_, guard) = self.device_ptr(self.stream());
        Loan { home: self.stream().cu_stream() as u64, context: self.context().cu_ctx() as u64, guard: Box::new(guard) }
    }
}

impl<T: Element + std::fmt::Debug> LenderMut for CudaSlice<T> {
    fn lend_mut(&mut self) -> Loan<'_> {
        let stream = self.stream().clone();
        // Lets the stream wait for earlier uses. Its guard would record a write now, before there is one.
        std::mem::forget(self.device_ptr_mut(&stream).1);
        Loan {
            home: stream.cu_stream() as u64,
            context: self.context().cu_ctx() as u64,
            guard: Box::new(Written { slice: self, stream }),
        }
    }
}

/// Records, when it drops, that a slice was written in the order of its stream.
struct Written<'a, T: Element> {
    slice: &'a mut CudaSlice<T>,
    stream: Arc<CudaStream>,
}

impl<T: Element> Drop for Written<'_, T> {
    fn drop(&mut self) {
        drop(self.slice.device_ptr_mut(&self.stream));
    }
}

impl<'a> TensorView<'a> {
    /// A contiguous view of a slice of `cudarc`.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] when the shape is not rank 4 or needs more elements than the slice has.
    pub fn from_cuda_slice<T: Element + std::fmt::Debug>(slice: &'a CudaSlice<T>, shape: &[usize]) -> Result<Self> {
        let layout = Layout::contiguous("tensor", T::DTYPE, shape)?;
        Self::from_cuda_slice_strided(slice, shape, &layout.strides, 0)
    }

    /// A strided view of a slice of `cudarc` that starts `offset` elements in.
    ///
    /// # Errors
    /// As [`TensorView::from_cuda_slice`], and when a stride is negative.
    pub fn from_cuda_slice_strided<T: Element + std::fmt::Debug>(
        slice: &'a CudaSlice<T>,
        shape: &[usize],
        strides: &[i64],
        offset: usize,
    ) -> Result<Self> {
        let layout = Layout::new("tensor", T::DTYPE, shape, strides)?;
        let address = address(slice) + offset_in(slice.num_bytes(), &layout, offset)?;
        let storage = Storage::Device { address, ordinal: slice.ordinal() as u32, owner: Some(Owner::Lender(slice)) };
        Ok(Self { layout, storage })
    }
}

impl<'a> TensorViewMut<'a> {
    /// A contiguous, writable view of a slice of `cudarc`.
    ///
    /// # Errors
    /// As [`TensorView::from_cuda_slice`].
    pub fn from_cuda_slice<T: Element + std::fmt::Debug>(slice: &'a mut CudaSlice<T>, shape: &[usize]) -> Result<Self> {
        let layout = Layout::contiguous("out", T::DTYPE, shape)?;
        Self::from_cuda_slice_strided(slice, shape, &layout.strides, 0)
    }

    /// A strided, writable view of a slice of `cudarc` that starts `offset` elements in.
    ///
    /// # Errors
    /// As [`TensorView::from_cuda_slice_strided`].
    pub fn from_cuda_slice_strided<T: Element + std::fmt::Debug>(
        slice: &'a mut CudaSlice<T>,
        shape: &[usize],
        strides: &[i64],
        offset: usize,
    ) -> Result<Self> {
        let layout = Layout::new("out", T::DTYPE, shape, strides)?;
        let address = address(slice) + offset_in(slice.num_bytes(), &layout, offset)?;
        let ordinal = slice.ordinal() as u32;
        Ok(Self { layout, storage: StorageMut::Device { address, ordinal, owner: Some(OwnerMut::Lender(slice)) } })
    }
}

/// Where a slice is. Nothing is read, so nothing needs to be recorded.
fn address<T: Element>(slice: &CudaSlice<T>) -> u64 {
    let (address, guard) = slice.device_ptr(slice.stream());
    std::mem::forget(guard);
    address
}

impl Runtime {
    /// A stream of `cudarc`, which lives as long as the returned value.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for the CPU backend, for a stream of another context than the device's primary one,
    /// and for the per-thread default stream, which is another stream on every thread.
    pub fn cudarc_stream(&self, stream: &Arc<CudaStream>) -> Result<Stream> {
        let context = self.context()?;
        if stream.context().cu_ctx() as u64 != context.handle.0 {
            let accepted = format!("a stream of the primary context of cuda:{}", context.info.ordinal);
            return Err(Error::invalid("stream", "a stream of another context", accepted));
        }
        Stream::foreign(context.clone(), StreamHandle(stream.cu_stream() as u64), Some(stream.clone()))
    }
}
