//! A story: who does what when, all of it from one seed.

use std::{
    cell::RefCell,
    collections::BTreeMap,
    future::Future,
    path::PathBuf,
    pin::Pin,
    rc::Rc,
    sync::{OnceLock, atomic::Ordering},
    task::{Context, Poll, Waker},
    time::Duration,
};

use candela::{
    clock::Clock,
    engine::StopParams,
    ledger::{db::Sqlite, schema::migrate},
    types::{NanoUsd, RequestId},
};
use rand::{Rng, RngExt, SeedableRng, rngs::StdRng};
use tempfile::TempDir;

use super::{
    check,
    client::{Plan, Seen, client},
    model::VOCABULARY,
    operator::{KEYS, Operator},
    server::{MODEL, Server, Setting},
};

/// Turns after which whoever still waits waits for ever.
const TURNS_MAX: u32 = 100_000;
/// Just before the ends of hours, days, weeks and months, and of winter time in Europe.
const STARTS: [&str; 4] = [
    "2026-03-28T22:59:57Z",
    "2026-03-29T00:59:57Z",
    "2026-03-31T21:59:56Z",
    "2026-02-28T23:59:58Z",
];

/// What a story came to, by name; two runs of a seed agree in all of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Came(BTreeMap<String, u64>);

impl Came {
    pub fn count(&mut self, name: &str, by: u64) {
        *self.0.entry(name.to_owned()).or_default() += by;
    }

    pub fn add(&mut self, other: &Self) {
        for (name, by) in &other.0 {
            self.count(name, *by);
        }
    }

    /// Stories that never meet what they are about prove nothing.
    pub fn had_everything(&self) {
        let all = [
            "finished",
            "cost_cap",
            "budget",
            "revoked",
            "ledger_lost",
            "aborted",
            "failed",
            "crashed",
            "denied",
            "refused",
            "unavailable",
            "not submitted",
            "left",
            "stalled",
            "died",
            "restarts",
            "outages",
            "preemptions",
            "windows",
            "operator",
        ];
        for name in all {
            assert!(self.0.get(name).is_some_and(|count| *count > 0), "never: {name} in {self:?}");
        }
    }
}

type Client = Pin<Box<dyn Future<Output = Seen>>>;

pub struct Story {
    random: StdRng,
    clock: Clock,
    dir: TempDir,
    operator: Operator,
    setting: Setting,
    servers: Rc<RefCell<Vec<Server>>>,
    clients: Vec<Client>,
    plans: Vec<Plan>,
    seen: Vec<Seen>,
    lives: u32,
    /// Turns between two things that go wrong, and two acts of the operator; 0 is never.
    trouble: u32,
    acts: u32,
    came: Came,
}

impl Story {
    pub fn new(seed: u64) -> Self {
        let mut random = StdRng::seed_from_u64(seed);
        let clock = Clock::simulated();
        let start: jiff::Timestamp =
            STARTS[random.random_range(0..STARTS.len())].parse().expect("a time");
        clock.set_wall(start.as_nanosecond() as i64);
        let dir = directory();
        let file = dir.path().join("ledger.sqlite");
        std::fs::write(&file, empty_ledger()).expect("writes");
        let db = Sqlite::open(&file, clock.clone()).expect("opens");
        let mut operator = Operator::new(db, clock.clone());
        operator.set_up(&mut random);
        let setting = Setting::new(&mut random);
        let mut story = Self {
            trouble: [0, 0, 400, 1_500][random.random_range(0..4)],
            acts: [0, 100, 400][random.random_range(0..3)],
            random,
            clock,
            dir,
            operator,
            setting,
            servers: Rc::default(),
            clients: Vec::new(),
            plans: Vec::new(),
            seen: Vec::new(),
            lives: 0,
            came: Came::default(),
        };
        for _ in 0..story.setting.servers {
            let server = story.start();
            story.servers.borrow_mut().push(server);
        }
        for index in 0..story.random.random_range(3..40) {
            story.invite(index);
        }
        story
    }

    fn file(&self) -> PathBuf {
        self.dir.path().join("ledger.sqlite")
    }

    fn start(&mut self) -> Server {
        self.lives += 1;
        let seed = self.random.next_u64();
        Server::start(&self.setting, &self.file(), &self.clock, self.lives, seed)
    }

    fn invite(&mut self, index: usize) {
        let plan = plan(&mut self.random, index, self.setting.servers);
        self.plans.push(plan.clone());
        let servers = self.servers.clone();
        let front = move |index: usize| servers.borrow()[index].front.clone();
        self.clients.push(Box::pin(client(plan, self.clock.clone(), front)));
    }

    /// Until every client has its answer, and everything is checked.
    pub fn run(mut self) -> Came {
        let mut turns = 0;
        while !self.clients.is_empty() {
            self.meddle();
            let moved = self.clients_move() | self.servers_move();
            // A machine that has nothing to do waits.
            let most_ns = if moved { 300_000 } else { 20_000_000 };
            self.clock.advance(Duration::from_nanos(self.random.random_range(0..most_ns)));
            turns += 1;
            assert!(turns < TURNS_MAX, "they wait for ever: {}", self.waiting());
        }
        self.wind_down();
        self.came.count("turns", turns.into());
        let Self { mut operator, seen, setting, mut came, .. } = self;
        check::all(&mut operator.db, &seen, &setting, &mut came);
        came
    }

    fn waiting(&self) -> String {
        let answered = |plan: &&Plan| self.seen.iter().any(|one| one.plan.id == plan.id);
        let plans: Vec<&Plan> = self.plans.iter().filter(|plan| !answered(plan)).collect();
        let servers = self.servers.borrow();
        let snapshots: Vec<_> = servers.iter().map(Server::snapshot).collect();
        format!("{plans:#?} {snapshots:#?} {:?}", self.setting)
    }

    fn clients_move(&mut self) -> bool {
        let mut context = Context::from_waker(Waker::noop());
        let before = self.clients.len();
        let seen = &mut self.seen;
        self.clients.retain_mut(|client| match client.as_mut().poll(&mut context) {
            Poll::Ready(one) => {
                seen.push(one);
                false
            }
            Poll::Pending => true,
        });
        self.clients.len() < before
    }

    fn servers_move(&mut self) -> bool {
        let mut moved = false;
        for server in self.servers.borrow_mut().iter_mut() {
            moved |= server.turn();
        }
        moved
    }

    /// What goes wrong, and what the operator does.
    fn meddle(&mut self) {
        let now = |random: &mut StdRng, every: u32| every > 0 && random.random_ratio(1, every);
        if now(&mut self.random, self.acts) {
            let known = self.random.random_range(0..self.plans.len());
            self.operator.act(&mut self.random, &self.plans[known].id);
            self.came.count("operator", 1);
        }
        if !now(&mut self.random, self.trouble) {
            return;
        }
        let index = self.random.random_range(0..self.setting.servers);
        let turn = |name: &str, on: bool| {
            let servers = self.servers.borrow();
            let switches = &servers[index].switches;
            match name {
                "cut" => &switches.cut,
                "fail" => &switches.fail_commit,
                _ => &switches.lose_answer,
            }
            .store(on, Ordering::Relaxed);
        };
        match self.random.random_range(0..8) {
            0 | 1 => {
                turn("cut", true);
                self.came.count("outages", 1);
            }
            2 | 3 => turn("cut", false),
            4 => turn("fail", true),
            5 => turn("lose", true),
            6 => {
                // As after SIGKILL: nothing is told to anyone.
                let new = self.start();
                let old = std::mem::replace(&mut self.servers.borrow_mut()[index], new);
                self.came.count("preemptions", old.snapshot().preemptions);
                self.came.count("kills", 1);
            }
            _ => {
                // A server that starts takes the place of one that has ended.
                let old = self.servers.borrow_mut().remove(index);
                self.came.count("preemptions", old.snapshot().preemptions);
                old.stop();
                self.came.count("restarts", 1);
                let new = self.start();
                self.servers.borrow_mut().insert(index, new);
            }
        }
    }

    /// With all clients gone and the database back, everything settles and the servers end.
    fn wind_down(&mut self) {
        self.operator.put_right();
        for server in self.servers.borrow().iter() {
            for switch in [&server.switches.cut, &server.switches.fail_commit] {
                switch.store(false, Ordering::Relaxed);
            }
            server.switches.lose_answer.store(false, Ordering::Relaxed);
        }
        // Longer than what a server that died held outlives it.
        for _ in 0..300 {
            self.servers_move();
            self.clock.advance(Duration::from_millis(50));
        }
        let servers = std::mem::take(&mut *self.servers.borrow_mut());
        for server in servers {
            assert!(
                server.is_idle(),
                "something runs for nobody: {:?} {:?}",
                server.snapshot(),
                self.setting
            );
            self.came.count("preemptions", server.snapshot().preemptions);
            server.stop();
        }
    }
}

fn plan(random: &mut StdRng, index: usize, servers: usize) -> Plan {
    let prompt_len = random.random_range(1..30);
    let max_tokens = random.random_range(1..40);
    let strings = (0..[0, 0, 1, 2][random.random_range(0..4)]).map(|_| {
        let letters = (0..random.random_range(1..3)).map(|_| random.random_range(b'!'..=b'~'));
        letters.map(char::from).collect()
    });
    let stop = StopParams {
        strings: strings.collect(),
        max_tokens,
        min_tokens: if random.random_ratio(1, 4) { random.random_range(0..=max_tokens) } else { 0 },
        ignore_eos: random.random_ratio(1, 2),
        enough_tokens: None,
    };
    let mut maybe = |chance: u32, most: u64| {
        random.random_ratio(1, chance).then(|| random.random_range(0..most))
    };
    let patience_ns = maybe(6, 400_000_000);
    let leaves_after = maybe(5, 30).map(|tokens| tokens as u32);
    let stalls_after = maybe(20, 10).map(|tokens| tokens as u32);
    let cap = maybe(4, 40_000).map(|amount| NanoUsd(amount.into()));
    let device_bound_ns = maybe(4, 5_000_000).unwrap_or(0);
    let idempotency = maybe(6, 4).map(|name| (format!("name {name}"), [(index % 2) as u8; 32]));
    let secrets = KEYS.map(|(key, _)| key);
    Plan {
        id: RequestId::new(format!("r{index}")),
        arrives_ns: random.random_range(0..3_000_000_000),
        server: random.random_range(0..servers),
        secret: if random.random_ratio(1, 20) {
            "nobody's"
        } else {
            secrets[random.random_range(0..KEYS.len())]
        },
        model: if random.random_ratio(1, 30) { "unpriced" } else { MODEL },
        prompt: (0..prompt_len).map(|_| random.random_range(0..VOCABULARY)).collect(),
        choices: [1, 1, 1, 2, 3][random.random_range(0..5)],
        stop,
        cap,
        device_bound_ns,
        idempotency,
        patience_ns,
        leaves_after,
        pause_ns: [0, 0, 0, 1_000_000, 80_000_000][random.random_range(0..5)],
        stalls_after,
    }
}

/// In memory where there is such a place: that it is durable is for other tests.
fn directory() -> TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).expect("a directory")
}

/// The file of a ledger without a row.
fn empty_ledger() -> &'static [u8] {
    static BYTES: OnceLock<Vec<u8>> = OnceLock::new();
    BYTES.get_or_init(|| {
        let dir = directory();
        let file = dir.path().join("ledger.sqlite");
        let mut db = Sqlite::open(&file, Clock::simulated()).expect("opens");
        migrate(&mut db).expect("migrates");
        // The last connection writes the log into the file.
        drop(db);
        std::fs::read(&file).expect("reads")
    })
}
