use flashcore::{DType, Device, TensorView, TensorViewMut};

fn main() {
    let shape = [1, 1, 4, 8];
    let strides = [32, 32, 8, 1];
    let _ = TensorView::from_raw(Device::Cuda(0), 4096, DType::F16, &shape, &strides);
    let _ = TensorViewMut::from_raw(Device::Cuda(0), 4096, DType::F16, &shape, &strides);
}
