//! `saga doctor`: looks at everything that the settings name, and says what would go wrong and what to do about it.
//!
//! [`look`] asks and changes nothing; [`judge`] makes findings of the answers, without I/O; this prints them.

mod judge;
mod look;

use std::fmt::Write;

use serde::Serialize;

use crate::config::Config;

/// Looks at everything that the settings name.
pub(crate) async fn examine(config: &Config) -> Vec<Finding> {
    judge::findings(config, &look::look(config).await)
}

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Verdict {
    /// As it should be.
    Ok,
    /// It works, but somebody should know.
    Warning,
    /// The shop would not run, or lose data.
    Failure,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Finding {
    /// What was looked at: `mysql order`, `redis 10.0.0.1:6379`.
    pub subject: String,
    /// What about it.
    pub check: &'static str,
    /// How bad it is.
    pub verdict: Verdict,
    /// What was found.
    pub found: String,
    /// What to do; none where nothing is to be done.
    pub advice: Option<String>,
}

impl Finding {
    /// All is well.
    fn ok(subject: &str, check: &'static str, found: impl Into<String>) -> Finding {
        Finding {
            subject: subject.to_owned(),
            check,
            verdict: Verdict::Ok,
            found: found.into(),
            advice: None,
        }
    }

    /// Something is to be done.
    fn not_ok(
        verdict: Verdict,
        subject: &str,
        check: &'static str,
        found: impl Into<String>,
        advice: impl Into<String>,
    ) -> Finding {
        let advice = Some(advice.into());
        Finding { subject: subject.to_owned(), check, verdict, found: found.into(), advice }
    }
}

/// Whether nothing keeps the shop from running.
pub(crate) fn healthy(findings: &[Finding]) -> bool {
    findings.iter().all(|finding| finding.verdict < Verdict::Failure)
}

/// For people: a line for each finding, and what to do below it.
pub(crate) fn table(findings: &[Finding]) -> String {
    let width =
        |text: fn(&Finding) -> &str| findings.iter().map(|f| text(f).chars().count()).max().unwrap_or(0);
    let (subjects, checks) = (width(|f| &f.subject), width(|f| f.check));
    let mut text = String::new();
    for Finding { subject, check, verdict, found, advice } in findings {
        let verdict = match verdict {
            Verdict::Ok => "ok  ",
            Verdict::Warning => "WARN",
            Verdict::Failure => "FAIL",
        };
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{verdict}  {subject:subjects$}  {check:checks$}  {found}");
        if let Some(advice) = advice {
            let _ = writeln!(text, "      -> {advice}");
        }
    }
    let count = |verdict| findings.iter().filter(|finding| finding.verdict == verdict).count();
    let (failures, warnings) = (count(Verdict::Failure), count(Verdict::Warning));
    let _ = writeln!(text, "{} checks: {failures} failed, {warnings} warnings", findings.len());
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_says_what_to_do() {
        let findings = [
            Finding::ok("nats a:1", "version", "2.15.0"),
            Finding::not_ok(Verdict::Warning, "mysql order", "sync_binlog", "0", "set it to 1"),
        ];
        assert!(healthy(&findings));
        let expected = "ok    nats a:1     version      2.15.0\n\
                        WARN  mysql order  sync_binlog  0\n      -> set it to 1\n\
                        2 checks: 0 failed, 1 warnings\n";
        assert_eq!(table(&findings), expected);
        let failed = Finding::not_ok(Verdict::Failure, "disk", "writable", "no", "make it so");
        assert!(!healthy(&[failed]));
    }
}
