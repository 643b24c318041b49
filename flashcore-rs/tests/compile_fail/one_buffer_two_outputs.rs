use flashcore::{DType, DeviceBuffer, Runtime, TensorView, TensorViewMut};

fn main() -> flashcore::Result<()> {
    let runtime = Runtime::cuda(0)?;
    let input = DeviceBuffer::filled(runtime.stream()?, 64, 0)?;
    let mut buffer = DeviceBuffer::filled(runtime.stream()?, 64, 0)?;
    let view = TensorView::from_buffer(&input, DType::F16, &[1, 1, 4, 8])?;
    let mut out = TensorViewMut::from_buffer(&mut buffer, DType::F16, &[1, 1, 4, 8])?;
    let mut lse = TensorViewMut::from_buffer(&mut buffer, DType::F32, &[1, 1, 4, 1])?;
    runtime.attention(&view, &view, &view).run_with_lse(&mut out, &mut lse)
}
