use flashcore::DeviceBuffer;

// Not every byte is a valid `bool`, so it must not be read from a device.
fn read(buffer: &DeviceBuffer) -> flashcore::Result<Vec<bool>> {
    buffer.to_vec()
}

fn main() {
    let _ = read;
}
