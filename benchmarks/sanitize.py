"""A small case of each kernel, to be run under NVIDIA's compute-sanitizer.

PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python benchmarks/sanitize.py
"""

from __future__ import annotations

import torch

from anymask import alibi, attention, causal, document, mask_from, softcap

SIZES = (2, 150), (1, 170), (1, 170)  # heads and lengths of q, k, v


def main() -> None:
    torch.manual_seed(0)
    for dtype in (torch.bfloat16, torch.float32):
        q, k, v = (
            torch.randn(1, heads, length, D, device="cuda", dtype=dtype, requires_grad=True)
            for (heads, length), D in zip(SIZES, (40, 40, 24), strict=True)
        )
        ids = torch.randint(0, 3, (170,), device="cuda")
        mask = (causal() & document(ids)) | mask_from(torch.rand(150, 170, device="cuda") < 0.5)
        score_mod = softcap(3.0).then(alibi(torch.rand(2, device="cuda")))
        attention(q, k, v, mask=mask, score_mod=score_mod).float().sum().backward()
        attention(q, k, v).float().sum().backward()
        assert all(bool(x.grad.isfinite().all()) for x in (q, k, v))
        if dtype == torch.bfloat16 and torch.cuda.get_device_capability() == (9, 0):
            q, k, v = (torch.randn(1, heads, length, 64, device="cuda", dtype=dtype) for heads, length in SIZES)
            for x in (q, k, v):
                x.requires_grad_()
            for is_fused in (True, False):
                config = {"dkdv": {"is_fused": is_fused}}
                for options in ({"mask": mask, "score_mod": score_mod}, {"mask": mask}, {}):
                    out = attention(q, k, v, backend="gluon", config=config, **options)
                    out.square().sum().backward()
            assert all(bool(x.grad.isfinite().all()) for x in (q, k, v))
            q, k, v = (x.detach().repeat(150, 1, 1, 1) for x in (q, k, v))  # more rows than multiprocessors
            attention(
                q, k, v, mask=causal() & document(ids), backend="gluon", config={"forward": {"is_persistent": True}}
            )
            q, k, v = (torch.randn(1, heads, length, 72, device="cuda", dtype=dtype) for heads, length in SIZES)
            attention(q, k, v, mask=causal(), backend="gluon")
    print("done")


if __name__ == "__main__":
    main()
