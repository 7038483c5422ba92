"""Processes of a run find each other, and each is told who is missing or differs; here each is a thread of this one."""

import concurrent.futures
import json
import os
import socket
import threading

import pytest

from gpt_jax.errors import InputError
from gpt_jax.parallel import rendezvous
from gpt_jax.parallel.rendezvous import Place, find, meet

LAUNCHERS = ('SLURM_', 'OMPI_', 'PMI_', 'KUBERNETES_', 'JAX_COORDINATOR', 'JAX_LOCAL', 'MEGASCALE_', 'TPU_')
SLURM = {
    'SLURM_JOB_ID': '1234567',
    'SLURM_STEP_NODELIST': 'gpu[017-018,021]',
    'SLURM_NTASKS': '24',
    'SLURM_PROCID': '11',
    'SLURM_LOCALID': '3',
}
OPEN_MPI = {
    'OMPI_MCA_orte_hnp_uri': '1531576320.0;tcp://10.96.0.1,10.148.0.1:34911',
    'OMPI_COMM_WORLD_SIZE': '4',
    'OMPI_COMM_WORLD_RANK': '2',
    'OMPI_COMM_WORLD_LOCAL_RANK': '2',
}


@pytest.fixture
def launched(monkeypatch):
    """A function: sets the variables of a launcher, and of no other."""
    for name in [name for name in os.environ if name.startswith(LAUNCHERS)]:
        monkeypatch.delenv(name)

    def set_variables(variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_variables


@pytest.fixture
def coordinator():
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return f'127.0.0.1:{probe.getsockname()[1]}'


@pytest.fixture(autouse=True)
def short_grace(monkeypatch):
    monkeypatch.setattr(rendezvous, '_GRACE_SECONDS', 0.5)


def meet_all(*places, seconds=0.5):
    """What each is told: None, or the error."""

    def one(place):
        try:
            meet(place, seconds)
        except InputError as error:
            return str(error)

    with concurrent.futures.ThreadPoolExecutor(len(places)) as executor:
        return list(executor.map(one, places))


@pytest.mark.parametrize(
    ('variables', 'place'),
    [
        (SLURM, Place('gpu017:63111', 24, 11, (3,))),
        (SLURM | {'JAX_COORDINATOR_PORT': '999'}, Place('gpu017:999', 24, 11, (3,))),
        (SLURM | {'JAX_LOCAL_DEVICE_IDS': '0,1'}, Place('gpu017:63111', 24, 11)),
        (OPEN_MPI, Place('10.96.0.1:62624', 4, 2, (2,))),
    ],
)
def test_a_place_is_what_the_launcher_says(launched, variables, place):
    launched(variables)
    assert find(None, None, None) == place
    given = find('other:1', 2, 1)
    assert given == Place('other:1', 2, 1, place.local_devices)


def test_the_three_flags_ask_no_cluster(launched, monkeypatch):
    launched({'KUBERNETES_SERVICE_HOST': '10.0.0.1'})  # jax would warn, or read a secret that pods may lack
    monkeypatch.setattr(rendezvous.clusters.ClusterEnv, 'auto_detect_unset_distributed_params', None)
    assert find('worker-0.run:1234', 8, 7) == Place('worker-0.run:1234', 8, 7)
    monkeypatch.setenv('JAX_COORDINATOR_ADDRESS', 'named:1')
    assert find(None, 2, 0) == Place('named:1', 2, 0)


@pytest.mark.parametrize(
    ('variables', 'given', 'message'),
    [
        ({}, (None, None, None), 'nothing here tells jax of the other processes; give --coordinator=HOST:PORT'),
        ({}, ('a:1', 2, None), 'nothing here tells jax --process_id; give'),
        ({}, ('a:1', None, None), 'nothing here tells jax --num_processes and --process_id; give'),
        ({'SLURM_JOB_ID': '7'}, (None, None, None), 'start it with srun, or give'),
        (SLURM | {'SLURM_NTASKS': 'x'}, (None, None, None), 'jax cannot tell the processes here (invalid literal'),
        (OPEN_MPI | {'OMPI_MCA_orte_hnp_uri': '4096.0;x'}, (None, None, None), 'Could not parse coordinator'),
        ({'KUBERNETES_SERVICE_HOST': '10.0.0.1'}, (None, None, None), 'as launch/kubernetes_jobset.yaml does'),
        (
            {'PMI_SIZE': '2', 'PMI_RANK': '0'},
            (None, None, None),
            '--num_processes=$PMI_SIZE and --process_id=$PMI_RANK',
        ),
        (
            {'OMPI_COMM_WORLD_SIZE': '2'},
            (None, None, None),
            'Open MPI 5 does not tell it: give --coordinator=HOST:PORT',
        ),
    ],
)
def test_what_the_launcher_does_not_say_is_named_with_the_way_out(launched, variables, given, message):
    launched(variables)
    with pytest.raises(InputError) as error:
        find(*given)
    assert message in str(error.value)


@pytest.mark.parametrize('count', [1, 2, 5])
def test_all_go_on_when_all_are_there_and_the_port_is_free_again(coordinator, count):
    places = [Place(coordinator, count, number) for number in range(count)]
    assert meet_all(*reversed(places), seconds=30) == [None] * count
    with socket.create_server(places[0].address):
        pass


def test_those_that_came_are_told_who_is_missing(coordinator):
    told = meet_all(*[Place(coordinator, 4, number) for number in (0, 2)])
    assert told[0] == told[1]
    came = f'processes 0 and 2 came, from {socket.gethostname()}'
    assert told[0] == (
        f'processes 1 and 3 of 4 did not come within 0.5 s ({came}); start all with the same command, or give those '
        'that start slowly more time with --connect_seconds'
    )


def test_who_is_missing_is_said_while_there_is_time(coordinator, capfd):
    meet_all(Place(coordinator, 2, 0))
    assert 'waiting up to 0.5 s for process 1\n' in capfd.readouterr().err


def test_where_process_0_is_missing_the_others_say_so(coordinator, capfd):
    (told,) = meet_all(Place(coordinator, 2, 1))
    assert told.startswith(f'--coordinator={coordinator}: process 0 did not answer within 0.5 s (Connection refused)')
    assert f'waiting up to 0.5 s for process 0 at {coordinator}' in capfd.readouterr().err


def test_a_host_without_a_name_yet_is_waited_for(launched, capfd):
    launched({})  # a pod's name is known when the pod is there
    (told,) = meet_all(find('worker-0.run.invalid:1234', 2, 1))
    assert 'process 0 did not answer within 0.5 s' in told
    assert capfd.readouterr().err.count('waiting up to 0.5 s') == 1


def test_process_0_finds_out_that_it_is_not_where_others_look_for_it(coordinator):
    port = coordinator.rpartition(':')[2]
    (told,) = meet_all(Place(f'192.0.2.1:{port}', 1, 0), seconds=0.1)  # an address that is nobody's
    assert 'process 0, which is this one on ' in told
    assert 'is not to be reached there' in told


def test_a_number_of_processes_that_differs_is_named(coordinator):
    told = meet_all(Place(coordinator, 3, 0), Place(coordinator, 3, 1), Place(coordinator, 2, 1), seconds=30)
    assert len(set(told)) == 1
    assert f'--num_processes=2 in process 1 (on {socket.gethostname()}) and 3 in process 0' in told[0]


def test_two_processes_of_one_number_are_named(coordinator):
    told = meet_all(*[Place(coordinator, 3, number) for number in (0, 1, 1)], seconds=30)
    here = f'{socket.gethostname()} (pid {os.getpid()})'
    expected = f'--process_id=1 was given to two processes, on {here} and {here}; give each its own, from 0'
    assert told == [expected] * 3


def test_those_that_come_a_moment_later_are_told_as_well(coordinator, monkeypatch):
    noticed, let_in = threading.Event(), rendezvous._Reception._let_in

    def noting(*arguments):
        wrong = let_in(*arguments)
        if wrong is not None:
            noticed.set()
        return wrong

    monkeypatch.setattr(rendezvous._Reception, '_let_in', noting)
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        early = executor.submit(meet_all, Place(coordinator, 3, 0), Place(coordinator, 2, 1), seconds=3)
        noticed.wait(30)
        late = meet_all(Place(coordinator, 3, 2), seconds=3)
    assert set(late) == set(early.result())


def test_one_that_died_meanwhile_may_come_again(coordinator):
    first, others = Place(coordinator, 3, 0), [Place(coordinator, 3, number) for number in (1, 2)]
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        told = executor.submit(meet_all, first, seconds=30)
        hello = {'gpt_jax': 'hello', 'process_id': 1, 'num_processes': 3, 'host': 'a', 'pid': 1}
        with connection_to(first) as connection:
            connection.sendall((json.dumps(hello) + '\n').encode())
        assert meet_all(*others, seconds=30) + told.result() == [None] * 3


@pytest.mark.parametrize(
    'said',
    [
        b'GET / HTTP/1.1\r\n\r\n',
        b'\n',
        b'[]\n',
        b'{"gpt_jax": "hello"}\n',
        b'{"gpt_jax": "hello", "process_id": -1, "num_processes": 2, "host": "a", "pid": 1}\n',
        b'[' * 60_000 + b'\n',
        b'x' * 200_000,
        b'\xff\xfe\n',
    ],
)
def test_whoever_else_comes_to_the_port_is_shown_out(coordinator, said):
    place = Place(coordinator, 2, 0)
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        first = executor.submit(meet, place, 30)
        with connection_to(place) as connection:
            try:
                connection.sendall(said)
                left = connection.recv(1)
            except ConnectionError:  # while it spoke
                left = b''
            assert left == b''
        meet(Place(coordinator, 2, 1), 30)
        first.result(30)


def test_whoever_says_nothing_is_of_no_account(coordinator):
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        first = executor.submit(meet, Place(coordinator, 2, 0), 30)
        with connection_to(Place(coordinator, 2, 0)):
            meet(Place(coordinator, 2, 1), 30)
        first.result(30)


def connection_to(place):
    """When process 0 listens."""
    while True:
        try:
            return socket.create_connection(place.address)
        except ConnectionRefusedError:
            pass


def test_another_service_at_the_port_is_not_taken_for_process_0(coordinator):
    def serve(listener):
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            connection.sendall(b'HTTP/1.1 400 Bad Request\r\n\r\n')
            connection.close()

    place = Place(coordinator, 2, 1)
    with socket.create_server(place.address) as listener:
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
        (told,) = meet_all(place, seconds=0.5)
        listener.shutdown(socket.SHUT_RDWR)
    assert 'process 0 did not answer within 0.5 s (what answers there is no process 0 that waits for others)' in told


def test_where_process_0_is_stopped_the_others_hear_of_it(coordinator, monkeypatch):
    came, let_in, ask = threading.Event(), rendezvous._Reception._let_in, rendezvous._ask

    def noting(*arguments):
        error = let_in(*arguments)
        came.set()
        return error

    def stopped(place, seconds):
        if place.process_id:
            return ask(place, seconds)
        came.wait(30)
        raise KeyboardInterrupt

    monkeypatch.setattr(rendezvous._Reception, '_let_in', noting)
    monkeypatch.setattr(rendezvous, '_ask', stopped)
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        told = executor.submit(meet_all, Place(coordinator, 3, 1), seconds=30)
        with pytest.raises(KeyboardInterrupt):
            meet(Place(coordinator, 3, 0), 30)
    assert told.result() == ['process 0 was stopped while it waited for the others; start all again']


def test_names_of_many():
    assert rendezvous.names({3}) == 'process 3'
    assert rendezvous.names(range(2, 5)) == 'processes 2, 3 and 4'
    assert rendezvous.names(range(1000)) == 'processes 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 990 more'
