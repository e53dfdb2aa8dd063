import cProfile, pstats, json, time, os, io
from pathlib import Path
import pytest
from slm.train.run import train
from slm.export.bundle import export_bundle
from tests.train.recipes import small
def timed(name, f, prof=True):
    import builtins
    print=lambda *a: builtins.print(*a, file=open("/tmp/tt/prof2.txt","a"))
    c,t=time.process_time(),time.monotonic(); f(1); print("##",name,"cpu %.2f"%(time.process_time()-c),"wall %.2f"%(time.monotonic()-t))
    n=[0,0.0]; real=os.fsync
    def fs(fd):
        t=time.monotonic(); real(fd); n[0]+=1; n[1]+=time.monotonic()-t
    os.fsync=fs
    c,t=time.process_time(),time.monotonic(); f(2); print("##",name,"cpu %.2f"%(time.process_time()-c),"wall %.2f"%(time.monotonic()-t), "fsyncs",n)
    os.fsync=real
    p=cProfile.Profile(time.process_time); p.enable(); f(3); p.disable()
    s=io.StringIO(); pstats.Stats(p,stream=s).sort_stats("cumtime").print_stats(45); print("\n".join(l[:150] for l in s.getvalue().splitlines() if "/slm/" in l or "method" in l))
def test_a(shared_checkpoint, stories):
    Path("s.txt").write_text("".join(f"{x.strip()}\n<|endoftext|>\n" for x in stories[:60]))
    timed("train", lambda n: train(small(Path("s.txt")), Path(f"t{n}")))
    timed("export", lambda n: export_bundle(shared_checkpoint, Path(f"e{n}")))
