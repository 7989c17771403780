import sys, torch, triton
from anymask import attention, causal
def bench(f): return triton.testing.do_bench(f,warmup=10,rep=50,return_mode="median")
def make(B,H,S,D): return [torch.randn(B,H,S,D,device="cuda",dtype=torch.bfloat16,requires_grad=True) for _ in range(3)]
DKDV=[(64,128,8,3),(64,128,8,2),(128,128,8,2),(32,128,4,3),(64,128,4,2),(64,64,4,3),(128,64,4,2),(64,64,4,2),(32,128,8,3),(128,64,8,2)]
DQ=[(128,64,8,3),(128,64,8,2),(128,128,8,2),(64,64,4,3),(64,128,4,2),(128,64,4,3),(128,32,4,3),(64,64,4,2),(128,64,4,2)]
for D,S in ((128,8192),(64,8192)):
    H=2048//D; B=16384//S; q,k,v=make(B,H,S,D); do=torch.randn_like(q)
    res={}
    for name in ("full","causal"):
        fl=4*B*H*D*(S*(S+1)//2 if name=="causal" else S*S)
        m=causal() if name=="causal" else None
        for kern,cfgs in (("dkdv",DKDV),("dq",DQ),("forward",((128,64,4,3),(128,64,8,3),(64,64,4,3)) )):
            for BQ,BK,w,s in cfgs:
                try:
                    c={kern:dict(BLOCK_Q=BQ,BLOCK_KV=BK,num_warps=w,num_stages=s)}
                    o=attention(q,k,v,mask=m,config=c)
                    if kern=="forward": t=bench(lambda: attention(q,k,v,mask=m,config=c)); r=fl/t*1e-9
                    else: t=bench(lambda: torch.autograd.grad(o,(q,k,v),do,retain_graph=True)); r=2.5*fl/t*1e-9
                    print(D,name,kern,BQ,BK,w,s,round(r,1),flush=True)
                except Exception as e: print(D,name,kern,BQ,BK,w,s,repr(e)[-100:],flush=True)
