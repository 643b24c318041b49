//! Views of tensors: shape, strides, element type and device, over memory that somebody else owns.

use crate::device::{DeviceBuffer, Lender, LenderMut};
use crate::dtype::{DType, Element};
use crate::error::{Error, Result};

/// Where a tensor's memory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Device {
    /// Host memory.
    Cpu,
    /// The CUDA device with this ordinal.
    Cuda(u32),
}

impl std::fmt::Display for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
        }
    }
}

/// Shape and strides of a `(batch, heads, seq, head_dim)` tensor, in elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Layout {
    /// Element type.
    pub dtype: DType,
    /// `(batch, heads, seq, head_dim)`.
    pub shape: [usize; 4],
    /// Distance in elements between neighbours along each dimension; never negative.
    pub strides: [i64; 4],
}

impl Layout {
    /// A layout from slices.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] when the rank is not 4, a stride is negative, or an offset inside the tensor does not
    /// fit 64 bits.
    #[inline]
    pub fn new(argument: &'static str, dtype: DType, shape: &[usize], strides: &[i64]) -> Result<Self> {
        Sized::new(argument, dtype, shape, strides).map(|sized| sized.layout)
    }

    /// The row-major layout of a shape.
    ///
    /// # Errors
    /// As [`Layout::new`].
    #[inline]
    pub fn contiguous(argument: &'static str, dtype: DType, shape: &[usize]) -> Result<Self> {
        Sized::contiguous(argument, dtype, shape).map(|sized| sized.layout)
    }

    /// Number of elements, those that zero strides repeat counted each time; saturates.
    pub fn len(&self) -> usize {
        if self.is_empty() { 0 } else { self.shape.iter().fold(1, |len, &size| len.saturating_mul(size)) }
    }

    /// Whether any dimension is 0.
    pub fn is_empty(&self) -> bool {
        self.shape.contains(&0)
    }

    /// Elements from the first to one past the last that the view touches; 0 when it is empty.
    pub fn extent(&self) -> usize {
        self.checked_extent().unwrap_or(usize::MAX)
    }

    /// [`Layout::checked_extent`] of what most tensors are; `None` of anything else.
    #[inline]
    fn small_extent(&self) -> Option<usize> {
        let [batch, heads, seq, dim] = self.shape;
        let last = self.shape.map(|size| size.wrapping_sub(1));
        let sizes = batch | heads | seq | dim | last[0] | last[1] | last[2] | last[3];
        let strides = self.strides[0] | self.strides[1] | self.strides[2] | self.strides[3];
        // Sizes from 1 to below 2^31 and strides below 2^26 of up to 8 bytes cannot overflow.
        if sizes >> 31 != 0 || strides >> 26 != 0 {
            return None;
        }
        let steps = |dim: usize| last[dim] * self.strides[dim] as usize;
        Some(1 + steps(0) + steps(1) + steps(2) + steps(3))
    }

    fn checked_extent(&self) -> Option<usize> {
        if let Some(extent) = self.small_extent() {
            return Some(extent);
        }
        if self.shape.iter().any(|&size| size > i32::MAX as usize) {
            return None;
        }
        if self.is_empty() {
            return Some(0);
        }
        let mut last = 0i64;
        for (&size, &stride) in self.shape.iter().zip(&self.strides) {
            last = last.checked_add(stride.checked_mul(i64::try_from(size - 1).ok()?)?)?;
        }
        let extent = last.checked_add(1)?;
        extent.checked_mul(self.dtype.size() as i64)?;
        usize::try_from(extent).ok()
    }

    /// Whether two index tuples can name the same element. Sorted by stride, each dimension must step over everything
    /// inside it; that is sufficient, and every ordinary view satisfies it.
    pub(crate) fn may_self_overlap(&self) -> bool {
        if self.is_empty() {
            return false;
        }
        let mut dims: Vec<(i64, usize)> =
            self.strides.iter().copied().zip(self.shape).filter(|&(_, size)| size > 1).collect();
        dims.sort_unstable();
        let mut inner = 1i64;
        for (stride, size) in dims {
            if stride < inner {
                return true;
            }
            inner = stride.saturating_mul(size as i64);
        }
        false
    }
}

/// A layout, and how many elements it spans: [`Layout::extent`], which to work out twice for every view of a call would be
/// a good part of the call.
struct Sized {
    layout: Layout,
    extent: usize,
}

impl Sized {
    /// See [`Layout::new`].
    #[inline]
    fn new(argument: &'static str, dtype: DType, shape: &[usize], strides: &[i64]) -> Result<Self> {
        if let (Ok(&shape), Ok(&strides)) = (<&[usize; 4]>::try_from(shape), <&[i64; 4]>::try_from(strides)) {
            let layout = Layout { dtype, shape, strides };
            if let Some(extent) = layout.small_extent() {
                return Ok(Self { layout, extent });
            }
        }
        Self::unusual(argument, dtype, shape, strides)
    }

    /// A layout that is large, or none.
    #[cold]
    fn unusual(argument: &'static str, dtype: DType, shape: &[usize], strides: &[i64]) -> Result<Self> {
        let (Ok(shape), Ok(strides)) = (<[usize; 4]>::try_from(shape), <[i64; 4]>::try_from(strides)) else {
            return Err(Error::invalid(
                argument,
                format!("shape {shape:?} with {} strides", strides.len()),
                "4 dimensions: (batch, heads, seq, head_dim)",
            ));
        };
        if strides.iter().any(|&s| s < 0) {
            return Err(Error::invalid(argument, format!("strides {strides:?}"), "strides >= 0"));
        }
        let layout = Layout { dtype, shape, strides };
        match layout.checked_extent() {
            Some(extent) => Ok(Self { layout, extent }),
            None => Err(Error::invalid(
                argument,
                format!("shape {shape:?} with strides {strides:?}"),
                "sizes below 2^31 and a total extent below 2^63 bytes",
            )),
        }
    }

    /// See [`Layout::contiguous`].
    #[inline]
    fn contiguous(argument: &'static str, dtype: DType, shape: &[usize]) -> Result<Self> {
        if let Ok(&shape) = <&[usize; 4]>::try_from(shape) {
            let [batch, heads, seq, dim] = shape;
            // The product of four sizes below 2^15 and 8 bytes cannot overflow.
            if (batch | heads | seq | dim) >> 15 == 0 && dim != 0 && seq != 0 && heads != 0 {
                let (inner, outer) = (seq * dim, heads * seq * dim);
                let strides = [outer as i64, inner as i64, dim as i64, 1];
                return Ok(Self { layout: Layout { dtype, shape, strides }, extent: batch * outer });
            }
        }
        let mut strides = [1i64; 4];
        if let Ok(shape) = <&[usize; 4]>::try_from(shape) {
            for i in (1..4).rev() {
                let size = i64::try_from(shape[i].max(1)).unwrap_or(i64::MAX);
                strides[i - 1] = strides[i].saturating_mul(size);
            }
        }
        Self::unusual(argument, dtype, shape, &strides[..shape.len().min(4)])
    }

    /// See [`offset_in`].
    #[inline]
    fn offset_in(&self, bytes: usize, offset: usize) -> Result<u64> {
        let size = self.layout.dtype.size();
        let needed = self.extent.checked_add(offset).and_then(|n| n.checked_mul(size));
        match needed {
            Some(needed) if needed <= bytes => Ok((offset * size) as u64),
            _ => Err(self.outside(bytes, offset)),
        }
    }

    #[cold]
    fn outside(&self, bytes: usize, offset: usize) -> Error {
        let Layout { shape, strides, dtype } = self.layout;
        let given = format!(
            "shape {shape:?}, strides {strides:?} of {dtype} from element {offset} over a buffer of {bytes} bytes"
        );
        Error::invalid("tensor", given, "a view inside the buffer")
    }
}

macro_rules! host_storage {
    ($($variant:ident: $ty:ty),* $(,)?) => {
        /// Host memory by element type.
        #[derive(Clone, Copy, Debug)]
        pub(crate) enum HostRef<'a> { $($variant(&'a [$ty])),* }

        /// Host memory by element type, writable.
        #[derive(Debug)]
        pub(crate) enum HostMut<'a> { $($variant(&'a mut [$ty])),* }

        impl HostRef<'_> {
            fn address(&self) -> u64 {
                match self { $(Self::$variant(s) => s.as_ptr().addr() as u64),* }
            }
        }

        impl HostMut<'_> {
            /// The same memory for a shorter time.
            pub(crate) fn reborrow(&mut self) -> HostMut<'_> {
                match self { $(Self::$variant(s) => HostMut::$variant(s)),* }
            }

            fn address(&self) -> u64 {
                match self { $(Self::$variant(s) => s.as_ptr().addr() as u64),* }
            }
        }

        $(impl HostElement for $ty {
            fn wrap(slice: &[Self]) -> HostRef<'_> { HostRef::$variant(slice) }
            fn wrap_mut(slice: &mut [Self]) -> HostMut<'_> { HostMut::$variant(slice) }
        })*
    };
}

/// An [`Element`] that host views can hold.
pub(crate) trait HostElement: Element {
    fn wrap(slice: &[Self]) -> HostRef<'_>;
    fn wrap_mut(slice: &mut [Self]) -> HostMut<'_>;
}

host_storage!(F16: half::f16, BF16: half::bf16, F32: f32, F64: f64, Bool: u8);

/// Who orders and frees device memory.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Owner<'a> {
    Buffer(&'a DeviceBuffer),
    /// Another library.
    Lender(&'a dyn Lender),
}

/// Who orders and frees writable device memory.
#[derive(Debug)]
pub(crate) enum OwnerMut<'a> {
    Buffer(&'a DeviceBuffer),
    /// Another library.
    Lender(&'a mut (dyn LenderMut + 'static)),
}

/// Memory behind a read-only view.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Storage<'a> {
    Host(HostRef<'a>),
    /// `owner` is `None` for foreign memory, whose ordering is the caller's contract.
    Device {
        address: u64,
        ordinal: u32,
        owner: Option<Owner<'a>>,
    },
}

/// Memory behind a writable view.
#[derive(Debug)]
pub(crate) enum StorageMut<'a> {
    Host(HostMut<'a>),
    Device { address: u64, ordinal: u32, owner: Option<OwnerMut<'a>> },
}

/// A read-only view of a `(batch, heads, seq, head_dim)` tensor with any strides.
#[derive(Clone, Copy, Debug)]
pub struct TensorView<'a> {
    pub(crate) layout: Layout,
    pub(crate) storage: Storage<'a>,
}

/// A writable view of a `(batch, heads, seq, head_dim)` tensor with any strides.
#[derive(Debug)]
pub struct TensorViewMut<'a> {
    pub(crate) layout: Layout,
    pub(crate) storage: StorageMut<'a>,
}

#[expect(private_bounds, reason = "the element types are sealed")]
impl<'a> TensorView<'a> {
    /// A contiguous view of host memory.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] when the shape is not rank 4 or needs more elements than `data` has.
    pub fn from_slice<T: HostElement>(data: &'a [T], shape: &[usize]) -> Result<Self> {
        let layout = Layout::contiguous("tensor", T::DTYPE, shape)?;
        Self::from_slice_strided(data, shape, &layout.strides)
    }

    /// A strided view of host memory; strides in elements.
    ///
    /// # Errors
    /// As [`TensorView::from_slice`], and when a stride is negative.
    pub fn from_slice_strided<T: HostElement>(data: &'a [T], shape: &[usize], strides: &[i64]) -> Result<Self> {
        let layout = Layout::new("tensor", T::DTYPE, shape, strides)?;
        check_fits(&layout, data.len())?;
        Ok(Self { layout, storage: Storage::Host(T::wrap(data)) })
    }
}

impl<'a> TensorView<'a> {
    /// A contiguous view of a device buffer.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] when the shape is not rank 4 or needs more bytes than the buffer has.
    #[inline]
    pub fn from_buffer(buffer: &'a DeviceBuffer, dtype: DType, shape: &[usize]) -> Result<Self> {
        Self::of_buffer(buffer, Sized::contiguous("tensor", dtype, shape)?, 0)
    }

    /// A strided view of a device buffer that starts `offset` elements in.
    ///
    /// # Errors
    /// As [`TensorView::from_buffer`], and when a stride is negative.
    pub fn from_buffer_strided(
        buffer: &'a DeviceBuffer,
        dtype: DType,
        shape: &[usize],
        strides: &[i64],
        offset: usize,
    ) -> Result<Self> {
        Self::of_buffer(buffer, Sized::new("tensor", dtype, shape, strides)?, offset)
    }

    #[inline]
    fn of_buffer(buffer: &'a DeviceBuffer, sized: Sized, offset: usize) -> Result<Self> {
        let address = buffer.address() + sized.offset_in(buffer.len(), offset)?;
        let layout = sized.layout;
        let ordinal = buffer.ordinal();
        let storage = Storage::Device { address, ordinal, owner: Some(Owner::Buffer(buffer)) };
        Ok(Self { layout, storage })
    }

    /// A view of memory that FlashCore does not own.
    ///
    /// # Errors
    /// As [`Layout::new`].
    ///
    /// # Safety
    /// On a device: whenever an operation that was given the view runs (a call, each launch of a
    /// [`PreparedCall`](crate::PreparedCall) or of a graph that captured one), and until it has finished on its stream,
    /// `address` is valid for reads of as many elements as the layout spans ([`Layout::extent`]), and nothing writes
    /// there except in stream order before or after the operation. Between operations the view is a number that nothing
    /// looks behind: the memory need not be there, whatever `'a` is.
    ///
    /// On the host: during all of `'a` the memory is valid for reads of as many elements, aligned to them, initialised,
    /// and not written.
    #[expect(unsafe_code, reason = "the one door for foreign memory")]
    #[inline]
    pub unsafe fn from_raw(
        device: Device,
        address: u64,
        dtype: DType,
        shape: &[usize],
        strides: &[i64],
    ) -> Result<Self> {
        let layout = Layout::new("tensor", dtype, shape, strides)?;
        let storage = match device {
            Device::Cuda(ordinal) => Storage::Device { address, ordinal, owner: None },
            // SAFETY: the caller promises `extent` readable, initialised, aligned elements at `address` for `'a`,
            // not written meanwhile; an empty extent gets a dangling but aligned pointer inside `host_ref`.
            Device::Cpu => Storage::Host(unsafe { raw::host_ref(address, &layout) }),
        };
        Ok(Self { layout, storage })
    }

    /// Shape, strides and element type.
    #[inline]
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Where the memory is.
    #[inline]
    pub fn device(&self) -> Device {
        match self.storage {
            Storage::Host(_) => Device::Cpu,
            Storage::Device { ordinal, .. } => Device::Cuda(ordinal),
        }
    }

    #[inline]
    pub(crate) fn address(&self) -> u64 {
        match &self.storage {
            Storage::Host(host) => host.address(),
            Storage::Device { address, .. } => *address,
        }
    }

    pub(crate) fn host(&self) -> Option<HostRef<'a>> {
        match self.storage {
            Storage::Host(host) => Some(host),
            Storage::Device { .. } => None,
        }
    }

    #[inline]
    pub(crate) fn owner(&self) -> Option<Owner<'a>> {
        match self.storage {
            Storage::Device { owner, .. } => owner,
            Storage::Host(_) => None,
        }
    }
}

#[expect(private_bounds, reason = "the element types are sealed")]
impl<'a> TensorViewMut<'a> {
    /// A contiguous, writable view of host memory.
    ///
    /// # Errors
    /// As [`TensorView::from_slice`].
    pub fn from_slice<T: HostElement>(data: &'a mut [T], shape: &[usize]) -> Result<Self> {
        let layout = Layout::contiguous("out", T::DTYPE, shape)?;
        Self::from_slice_strided(data, shape, &layout.strides)
    }

    /// A strided, writable view of host memory; strides in elements.
    ///
    /// # Errors
    /// As [`TensorView::from_slice_strided`].
    pub fn from_slice_strided<T: HostElement>(data: &'a mut [T], shape: &[usize], strides: &[i64]) -> Result<Self> {
        let layout = Layout::new("out", T::DTYPE, shape, strides)?;
        check_fits(&layout, data.len())?;
        Ok(Self { layout, storage: StorageMut::Host(T::wrap_mut(data)) })
    }
}

impl<'a> TensorViewMut<'a> {
    /// A contiguous, writable view of a device buffer.
    ///
    /// # Errors
    /// As [`TensorView::from_buffer`].
    #[inline]
    pub fn from_buffer(buffer: &'a mut DeviceBuffer, dtype: DType, shape: &[usize]) -> Result<Self> {
        Self::of_buffer(buffer, Sized::contiguous("out", dtype, shape)?, 0)
    }

    /// A strided, writable view of a device buffer that starts `offset` elements in.
    ///
    /// # Errors
    /// As [`TensorView::from_buffer_strided`].
    pub fn from_buffer_strided(
        buffer: &'a mut DeviceBuffer,
        dtype: DType,
        shape: &[usize],
        strides: &[i64],
        offset: usize,
    ) -> Result<Self> {
        Self::of_buffer(buffer, Sized::new("out", dtype, shape, strides)?, offset)
    }

    #[inline]
    fn of_buffer(buffer: &'a mut DeviceBuffer, sized: Sized, offset: usize) -> Result<Self> {
        let address = buffer.address() + sized.offset_in(buffer.len(), offset)?;
        let layout = sized.layout;
        let ordinal = buffer.ordinal();
        let storage = StorageMut::Device { address, ordinal, owner: Some(OwnerMut::Buffer(buffer)) };
        Ok(Self { layout, storage })
    }

    /// A writable view of memory that FlashCore does not own.
    ///
    /// # Errors
    /// As [`Layout::new`].
    ///
    /// # Safety
    /// As [`TensorView::from_raw`], for reads and writes, and nothing else accesses the memory: on the host during `'a`,
    /// on a device while an operation that was given the view runs, except in stream order before or after it.
    #[expect(unsafe_code, reason = "the one door for foreign memory")]
    #[inline]
    pub unsafe fn from_raw(
        device: Device,
        address: u64,
        dtype: DType,
        shape: &[usize],
        strides: &[i64],
    ) -> Result<Self> {
        let layout = Layout::new("out", dtype, shape, strides)?;
        let storage = match device {
            Device::Cuda(ordinal) => StorageMut::Device { address, ordinal, owner: None },
            // SAFETY: the caller promises `extent` writable, initialised, aligned elements at `address` that nothing
            // else accesses during `'a`.
            Device::Cpu => StorageMut::Host(unsafe { raw::host_mut(address, &layout) }),
        };
        Ok(Self { layout, storage })
    }

    /// Shape, strides and element type.
    #[inline]
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Where the memory is.
    #[inline]
    pub fn device(&self) -> Device {
        match self.storage {
            StorageMut::Host(_) => Device::Cpu,
            StorageMut::Device { ordinal, .. } => Device::Cuda(ordinal),
        }
    }

    #[inline]
    pub(crate) fn address(&self) -> u64 {
        match &self.storage {
            StorageMut::Host(host) => host.address(),
            StorageMut::Device { address, .. } => *address,
        }
    }

    #[inline]
    pub(crate) fn owner(&self) -> Option<&OwnerMut<'a>> {
        match &self.storage {
            StorageMut::Device { owner, .. } => owner.as_ref(),
            StorageMut::Host(_) => None,
        }
    }

    pub(crate) fn owner_mut(&mut self) -> Option<OwnerMut<'_>> {
        match &mut self.storage {
            StorageMut::Device { owner: Some(OwnerMut::Buffer(buffer)), .. } => Some(OwnerMut::Buffer(buffer)),
            StorageMut::Device { owner: Some(OwnerMut::Lender(lender)), .. } => Some(OwnerMut::Lender(&mut **lender)),
            StorageMut::Device { owner: None, .. } => None,
            StorageMut::Host(_) => None,
        }
    }
}

fn check_fits(layout: &Layout, len: usize) -> Result<()> {
    if layout.extent() <= len {
        return Ok(());
    }
    Err(Error::invalid(
        "tensor",
        format!("shape {:?}, strides {:?} over {len} elements", layout.shape, layout.strides),
        format!("memory of at least {} elements", layout.extent()),
    ))
}

/// Bytes before the element at `offset`, if a view from there lies inside `bytes` of memory.
pub(crate) fn offset_in(bytes: usize, layout: &Layout, offset: usize) -> Result<u64> {
    Sized { layout: *layout, extent: layout.extent() }.offset_in(bytes, offset)
}

/// Slices from raw parts, for `from_raw` alone.
#[expect(unsafe_code, reason = "the one door for foreign memory")]
mod raw {
    use std::ptr::{NonNull, with_exposed_provenance, with_exposed_provenance_mut};

    use super::{HostElement, HostMut, HostRef, Layout};
    use crate::dtype::DType;

    /// # Safety
    /// `address` is valid for reads of `layout.extent()` initialised, aligned elements that nothing writes during `'a`.
    pub(super) unsafe fn host_ref<'a>(address: u64, layout: &Layout) -> HostRef<'a> {
        // SAFETY: forwarded from the caller, for the type that `layout.dtype` names.
        unsafe {
            match layout.dtype {
                DType::F16 => slice::<half::f16>(address, layout),
                DType::BF16 => slice::<half::bf16>(address, layout),
                DType::F32 => slice::<f32>(address, layout),
                DType::F64 => slice::<f64>(address, layout),
                DType::Bool => slice::<u8>(address, layout),
            }
        }
    }

    /// # Safety
    /// As [`host_ref`], for writes too, and nothing else accesses the memory during `'a`.
    pub(super) unsafe fn host_mut<'a>(address: u64, layout: &Layout) -> HostMut<'a> {
        // SAFETY: forwarded from the caller, for the type that `layout.dtype` names.
        unsafe {
            match layout.dtype {
                DType::F16 => slice_mut::<half::f16>(address, layout),
                DType::BF16 => slice_mut::<half::bf16>(address, layout),
                DType::F32 => slice_mut::<f32>(address, layout),
                DType::F64 => slice_mut::<f64>(address, layout),
                DType::Bool => slice_mut::<u8>(address, layout),
            }
        }
    }

    unsafe fn slice<'a, T: HostElement>(address: u64, layout: &Layout) -> HostRef<'a> {
        let ptr = match layout.extent() {
            0 => NonNull::<T>::dangling().as_ptr().cast_const(),
            _ => with_exposed_provenance::<T>(address as usize),
        };
        // SAFETY: `extent` elements are readable at `ptr` (the caller's promise), or there are none and it dangles.
        T::wrap(unsafe { std::slice::from_raw_parts(ptr, layout.extent()) })
    }

    unsafe fn slice_mut<'a, T: HostElement>(address: u64, layout: &Layout) -> HostMut<'a> {
        let ptr = match layout.extent() {
            0 => NonNull::dangling().as_ptr(),
            _ => with_exposed_provenance_mut::<T>(address as usize),
        };
        // SAFETY: `extent` elements are ours alone at `ptr` (the caller's promise), or there are none and it dangles.
        T::wrap_mut(unsafe { std::slice::from_raw_parts_mut(ptr, layout.extent()) })
    }
}
