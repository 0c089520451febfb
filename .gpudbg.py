import torch, math
import torch.nn.functional as F
from torch.nn.attention import sdpa_kernel, SDPBackend
from tests.oracle import attention_n
A=torch.ops.aten
torch.manual_seed(0)
def ref(q,k,v,do,causal):
    q,k,v=[x.double().detach().requires_grad_() for x in (q,k,v)]
    o,l=attention_n(q,k,v,0.0,causal=causal)
    return o,l,*torch.autograd.grad((o*do.double()).sum(),(q,k,v))
def err(a,b): return f"{(a.double()-b).abs().max().item():.1e}"
junk=[torch.full((1<<20,),float('nan'),device='cuda') for _ in range(20)]; del junk
for dt in (torch.float16,torch.bfloat16,torch.float32):
  for (L,S,E) in ((16,16,64),(33,33,16),(64,64,64),(512,512,64)):
    q,k,v=[torch.randn(2,4,n,E,device="cuda",dtype=dt) for n in (L,S,S)]
    do=torch.randn_like(q); R=ref(q,k,v,do,False)
    T=lambda x:x.transpose(1,2)
    def show(name,g): print(dt,L,S,E,name,[err(x,r) for x,r in zip(g[:3],R[2:])])
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        qq,kk,vv=[x.clone().requires_grad_() for x in (q,k,v)]
        show("sdpa autograd",torch.autograd.grad((F.scaled_dot_product_attention(qq,kk,vv)*do).sum(),(qq,kk,vv)))
    o,l,s,f=A._scaled_dot_product_efficient_attention(q,k,v,None,True,0.0,False,scale=E**-.5)
    show("sdpa ops",A._scaled_dot_product_efficient_attention_backward(do,q,k,v,None,o,l,s,f,0.0,[True,True,True,False],False,scale=E**-.5))
    o,l,s,f,mq,mk=A._efficient_attention_forward(T(q),T(k),T(v),None,None,None,None,None,0.0,0,True,scale=E**-.5)
    def bw(do=T(do),o=o,l=l,s=s,f=f,mq=L,mk=S,**kw): return [T(x) for x in A._efficient_attention_backward(do,T(q),T(k),T(v),None,o,None,None,mq,mk,l,0.0,s,f,0,False,scale=E**-.5,**kw)[:3]]
    show("own lse",bw())
    show("own o clone",bw(o=o.clone()))
    show("o contiguous",bw(o=o.contiguous()))
    show("do contiguous",bw(do=T(do).contiguous()))
    show("both contiguous",bw(do=T(do).contiguous(),o=o.contiguous()))
    show("splits 1",bw(num_splits_key=1))
    print(o.stride(), l.stride(), T(do).stride(), o.shape, l.shape)
