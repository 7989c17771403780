import torch, anymask
from anymask import *
torch.manual_seed(0)
for dt in (torch.bfloat16,torch.float32):
    q=torch.randn(1,2,150,40,device="cuda",dtype=dt,requires_grad=True); k=torch.randn(1,1,170,40,device="cuda",dtype=dt,requires_grad=True); v=torch.randn(1,1,170,24,device="cuda",dtype=dt,requires_grad=True)
    ids=torch.randint(0,3,(170,),device="cuda"); t=torch.rand(150,170,device="cuda")<.5
    m=(causal()&document(ids))|mask_from(t)
    out=attention(q,k,v,mask=m,score_mod=softcap(3.0).then(alibi(torch.rand(2,device="cuda")))); out.float().sum().backward()
torch.cuda.synchronize(); print("ran", q.grad.norm().item())
