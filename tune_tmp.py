import sys, itertools, json, torch, triton, functools
from anymask import attention, causal
from torch.nn.attention.flex_attention import flex_attention, create_block_mask
torch._dynamo.config.recompile_limit=1000
def bench(f): return triton.testing.do_bench(f,warmup=20,rep=80,return_mode="median")
def make(B,H,S,D): return [torch.randn(B,H,S,D,device="cuda",dtype=torch.bfloat16,requires_grad=True) for _ in range(3)]
flex=torch.compile(flex_attention,dynamic=False)
for D,S in ((128,8192),(64,8192)):
    H=2048//D; B=16384//S; q,k,v=make(B,H,S,D); do=torch.randn_like(q)
    for name in ("full","causal"):
        fl=4*B*H*D*(S*(S+1)//2 if name=="causal" else S*S)
        m=causal() if name=="causal" else None
        bm=create_block_mask(lambda b,h,q,k:q>=k,None,None,S,S,device="cuda") if m else None
        o=flex(q,k,v,block_mask=bm); t=bench(lambda: flex(q,k,v,block_mask=bm)); tb=bench(lambda: torch.autograd.grad(o,(q,k,v),do,retain_graph=True))
        print("flex",name,D,round(fl/t*1e-9),round(2.5*fl/tb*1e-9),flush=True)
        o2=attention(q,k,v,mask=m); print("diff",(o-o2).abs().max().item())
        t=bench(lambda: attention(q,k,v,mask=m)); tb=bench(lambda: torch.autograd.grad(o2,(q,k,v),do,retain_graph=True))
        print("ours",name,D,round(fl/t*1e-9),round(2.5*fl/tb*1e-9),flush=True)
        if name=="full": continue
        from anymask.kernels import plan as P
        for BQ,BK,w,s in ((128,64,8,3),(128,64,8,2),(128,64,4,3),(128,128,8,2),(128,128,8,3),(128,128,4,3),(128,128,4,2),(64,64,4,3),(64,128,4,3),(128,32,4,4)):
            try:
                c={"forward":dict(BLOCK_Q=BQ,BLOCK_KV=BK,num_warps=w,num_stages=s)}
                attention(q,k,v,mask=m,config=c); t=bench(lambda: attention(q,k,v,mask=m,config=c)); print("fwd",D,BQ,BK,w,s,round(fl/t*1e-9),flush=True)
            except Exception as e: print("fwd",BQ,BK,w,s,repr(e)[:80])
