from t5x_lite.environment import set_defaults


def defaults(tmp_path, **given):
    environment = {"XDG_CACHE_HOME": str(tmp_path), **given}
    set_defaults(environment, tmp_path / "devices")
    return environment


def pci(tmp_path, vendor):
    (tmp_path / "devices" / "0000:00:04.0").mkdir(parents=True)
    (tmp_path / "devices" / "0000:00:04.0" / "vendor").write_text(vendor + "\n")


def test_compiled_programs_are_kept_unless_the_user_says_where(tmp_path):
    name = "JAX_COMPILATION_CACHE_DIR"
    assert defaults(tmp_path, **{name: "mine"})[name] == "mine"
    assert defaults(tmp_path)[name] == str(tmp_path / "t5x_lite" / "xla")
    (tmp_path / "file").touch()  # can't hold a folder
    assert name not in defaults(tmp_path, XDG_CACHE_HOME=str(tmp_path / "file"))


def test_emulated_devices_get_threads_to_wait_in(tmp_path):
    assert "NPROC" not in defaults(tmp_path)
    flags = "--a=1 --xla_force_host_platform_device_count=4 --b"
    assert defaults(tmp_path, XLA_FLAGS=flags)["NPROC"] == "32"
    assert defaults(tmp_path, JAX_NUM_CPU_DEVICES="2")["NPROC"] == "16"
    assert defaults(tmp_path, XLA_FLAGS=flags, NPROC="3")["NPROC"] == "3"


def test_libtpu_is_told_who_it_is_where_there_is_no_tpu(tmp_path):
    pci(tmp_path, "0x10de")
    assert defaults(tmp_path)["TPU_SKIP_MDS_QUERY"] == "1"
    assert defaults(tmp_path, TPU_WORKER_HOSTNAMES="a,b")["TPU_WORKER_HOSTNAMES"] == "a,b"


def test_a_tpu_says_itself_who_it_is(tmp_path):
    pci(tmp_path, "0x1ae0")
    assert not [name for name in defaults(tmp_path) if name.startswith("TPU_")]
