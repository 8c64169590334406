//! The page that shows a plan: what it holds, and that a browser draws it by itself.

use crate::plain::node;
use baton_planner::Policy;
use baton_planner::profile::{ErrorBar, Profile, estimate, gpu, model};
use baton_planner::report::{About, html, value};
use baton_planner::search::{Answer, Given, Nearest, NodeClass, Prices, Question, plan};
use baton_planner::workload::{Arrivals, Generator, Lengths, Spread};
use std::path::Path;
use std::process::Command;

/// A small plan; `compared`: its profile has error bars.
fn planned(compared: bool) -> (Vec<Profile>, Question, Answer) {
    let mut profile = estimate(gpu("h100").unwrap(), model("llama-3.1-8b").unwrap()).unwrap();
    if compared {
        profile.error_bars = [("ttft_p90", 0.12), ("itl_p50", -0.04)]
            .map(|(metric, error)| ErrorBar {
                metric: metric.to_owned(),
                error,
                run: "half load </script><b>".to_owned(),
            })
            .to_vec();
    }
    let generator = Generator {
        requests: 300,
        arrivals: Arrivals::Poisson(2.0),
        inputs: Lengths::Exponential(6000.0),
        outputs: Lengths::Constant(100),
    };
    let question = Question {
        workload: generator.draw(3),
        classes: vec![NodeClass::new(&node(&profile), Prices::both(2.5))],
        slo: "ttft_p90=2s,itl_p99=40ms".parse().unwrap(),
        policy: Policy::Predicted,
    };
    let answer = plan(&question, Given::Nodes(3), &|_| {}).unwrap();
    (vec![profile], question, answer)
}

fn about<'a>(profiles: &'a [Profile], question: &'a Question) -> About<'a> {
    About {
        profiles,
        question,
        given: Given::Nodes(3),
        trace: "drawn.jsonl",
        spread: Spread::Raw,
        priced: true,
    }
}

#[test]
fn the_page_holds_all_it_needs_and_the_same_figures() {
    let (profiles, question, answer) = planned(true);
    let about = about(&profiles, &question);
    let (page, value) = (html(&about, &answer), value(&about, &answer));
    for start in ["http://", "https://"] {
        for (at, _) in page.match_indices(start) {
            let before = &page[..at];
            let loads = ["src=\"", "href=\"", "url(", "@import "]
                .iter()
                .any(|word| before.ends_with(word));
            assert!(!loads, "the page loads {}", &page[at..at + 60]);
        }
    }
    assert!(
        page.contains("default-src 'none'"),
        "the browser is told to load nothing"
    );
    assert!(page.contains("uPlot") && page.contains("MIT License"));
    assert!(!page.contains("{{"), "every place is filled");
    // The data is one element: what stands in it ends it nowhere.
    let data = page
        .split_once("id=\"data\">")
        .unwrap()
        .1
        .split_once("</script>")
        .unwrap()
        .0;
    assert_eq!(data.replace("\\u003c", "<"), value.to_string());
    assert!(data.contains("\\u003c/script>"));
    for field in [
        "feasible",
        "prefill",
        "decode",
        "goodput_rps",
        "attainment",
        "bottleneck",
        "cost_per_mtok",
        "verdicts",
        "regret",
        "error_bar",
        "distributions",
        "percentiles",
        "fixes",
        "utilisation",
        "question",
        "profiles",
    ] {
        assert!(!value[field].is_null(), "{field}");
    }
    assert_eq!(value["error_bar"]["ttft_p90"], 0.12);
    assert_eq!(value["divisions"].as_array().unwrap().len(), 3);
    let shares = value["distributions"]["ttft"].as_array().unwrap();
    assert_eq!(shares[shares.len() - 1][1], 1.0, "everybody was served");
}

/// Gives what the page is after its scripts have run, and what the browser wrote.
fn drawn(browser: &str, folder: &Path, page: &str) -> (String, String) {
    let path = folder.join("plan.html");
    std::fs::write(&path, page).unwrap();
    let output = Command::new(browser)
        .args([
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--enable-logging=stderr",
            "--v=0",
            "--virtual-time-budget=4000",
        ])
        // Whoever asks for a name is told that there is none.
        .args([
            "--host-resolver-rules=MAP * ~NOTFOUND",
            "--window-size=1280,1800",
            "--dump-dom",
        ])
        .arg(format!("--user-data-dir={}", folder.join("user").display()))
        .arg(format!("file://{}", path.display()))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (text(&output.stdout), text(&output.stderr))
}

#[test]
fn a_browser_draws_the_page_without_an_error_and_without_a_network() {
    let names = [
        "chromium-headless-shell",
        "chromium",
        "chromium-browser",
        "google-chrome",
    ];
    let works = |name: &&&str| Command::new(name).arg("--version").output().is_ok();
    let Some(browser) = names.iter().find(works) else {
        eprintln!("SKIPPED: none of {names:?} is installed; the page was not opened in a browser");
        return;
    };
    for compared in [false, true] {
        let (profiles, question, answer) = planned(compared);
        let folder = tempfile::tempdir().unwrap();
        let about = about(&profiles, &question);
        let (dom, said) = drawn(browser, folder.path(), &html(&about, &answer));
        // The page's own script is loud where it fails.
        assert!(!said.contains("CONSOLE"), "{said}");
        let charts = if compared { 4 } else { 3 };
        assert_eq!(dom.matches("<canvas").count(), charts, "{said}");
        assert_eq!(dom.contains(">Nothing was compared"), !compared);
        assert!(dom.contains(">Does the plan beat the others?"), "{dom}");

        let nearest = Nearest::Slo("ttft_p90=9s".parse().unwrap());
        let (dom, said) = drawn(browser, folder.path(), &html(&about, &Answer::Infeasible { nearest }));
        assert!(!said.contains("CONSOLE"), "{said}");
        assert!(dom.contains(">infeasible: nearest feasible is --slo ttft_p90=9000ms"));
    }
    // Ends of a distribution that are far from round ones.
    let (profiles, question, answer) = planned(false);
    let page = html(&about(&profiles, &question), &answer);
    let (before, rest) = page.split_once("\"ttft\":[[").unwrap();
    let after = rest.split_once("]]").unwrap().1;
    let page = format!("{before}\"ttft\":[[0.009544,0.00008],[0.014937,0.0063],[30.324239,1]]{after}");
    let folder = tempfile::tempdir().unwrap();
    let (dom, said) = drawn(browser, folder.path(), &page);
    assert!(
        !said.contains("CONSOLE") && dom.matches("<canvas").count() == 3,
        "{said}"
    );
    // The check sees errors: a page that has one is not let through.
    let folder = tempfile::tempdir().unwrap();
    let (_, said) = drawn(browser, folder.path(), "<script>throw new Error('broken')</script>");
    assert!(said.contains("CONSOLE"), "an error was not seen: {said}");
}
