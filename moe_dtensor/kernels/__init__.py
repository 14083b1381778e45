"""Functions on plain tensors: expert MLP, router, Sinkhorn, attention, norm and rotation of heads, cross-entropy,
sums of gradients, AdamW. They know no module, no mesh, no DTensor.

Letters of tensor names: T tokens, D model width, F expert hidden width, E experts, K choices of a token, N = T*K
copies of tokens, G up-projections (2 for gated activations, index 0 the gate; 1 for plain), V vocabulary. Every fast
path stands beside a reference in clear PyTorch that runs on any device and in any dtype, float64 included.
"""
