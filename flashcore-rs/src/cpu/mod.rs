//! Attention on the CPU.
pub(crate) struct HostInputs<'a> {
    pub query: crate::tensor::HostRef<'a>,
    pub key: crate::tensor::HostRef<'a>,
    pub value: crate::tensor::HostRef<'a>,
    pub attn_mask: Option<crate::tensor::HostRef<'a>>,
}
pub(crate) fn attention(
    _problem: &crate::Problem,
    _inputs: HostInputs<'_>,
    _out: crate::tensor::HostMut<'_>,
    _lse: Option<&mut [f32]>,
) {
    todo!()
}
