use flashcore::{DType, DeviceBuffer, Runtime, TensorView, TensorViewMut};

fn main() -> flashcore::Result<()> {
    let runtime = Runtime::cuda(0)?;
    let stream = runtime.new_stream()?;
    let buffer = DeviceBuffer::filled(&stream, 64, 0)?;
    let mut out = DeviceBuffer::filled(&stream, 64, 0)?;
    let view = TensorView::from_buffer(&buffer, DType::F16, &[1, 1, 4, 8])?;
    let call = runtime.attention(&view, &view, &view).on(&stream);
    drop(stream);
    call.run(&mut TensorViewMut::from_buffer(&mut out, DType::F16, &[1, 1, 4, 8])?)
}
