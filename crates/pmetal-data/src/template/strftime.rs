const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

/// A moment of the calendar.
struct Moment {
    year: u64,
    /// From 0.
    month: usize,
    /// From 1.
    day: u64,
    /// From 0 = Sunday.
    weekday: usize,
    /// From 1.
    day_of_year: u64,
    hour: u64,
    minute: u64,
    second: u64,
}

/// `seconds` since 1970 (UTC) in the words of C's `strftime`; a directive that is not known stays as it is.
pub(super) fn strftime(seconds: u64, format: &str) -> String {
    let moment = Moment::at(seconds);
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        match chars.next() {
            // glibc: `%-d` is `%d` without padding.
            Some('-') => match chars.next() {
                Some(directive) => out.push_str(moment.directive(directive).trim_start_matches(['0', ' '])),
                None => out.push_str("%-"),
            },
            Some(directive) => out.push_str(&moment.directive(directive)),
            None => out.push('%'),
        }
    }
    out
}

impl Moment {
    fn at(seconds: u64) -> Self {
        let (mut days, in_day) = (seconds / 86_400, seconds % 86_400);
        let weekday = ((days + 4) % 7) as usize;
        let leap = |year: u64| (year.is_multiple_of(4) && !year.is_multiple_of(100)) || year.is_multiple_of(400);
        let mut year = 1970;
        while days >= 365 + u64::from(leap(year)) {
            days -= 365 + u64::from(leap(year));
            year += 1;
        }
        let day_of_year = days + 1;
        let mut month = 0;
        for length in [31, 28 + u64::from(leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30] {
            if days < length {
                break;
            }
            days -= length;
            month += 1;
        }
        let (hour, minute, second) = (in_day / 3600, in_day / 60 % 60, in_day % 60);
        Self { year, month, day: days + 1, weekday, day_of_year, hour, minute, second }
    }

    fn directive(&self, directive: char) -> String {
        let month = MONTHS.get(self.month).copied().unwrap_or_default();
        let weekday = DAYS.get(self.weekday).copied().unwrap_or_default();
        let short = |name: &str| name.chars().take(3).collect();
        let hour12 = (self.hour + 11) % 12 + 1;
        match directive {
            'Y' => self.year.to_string(),
            'y' => format!("{:02}", self.year % 100),
            'm' => format!("{:02}", self.month + 1),
            'B' => month.to_string(),
            'b' | 'h' => short(month),
            'd' => format!("{:02}", self.day),
            'e' => format!("{:2}", self.day),
            'j' => format!("{:03}", self.day_of_year),
            'A' => weekday.to_string(),
            'a' => short(weekday),
            'w' => self.weekday.to_string(),
            'H' => format!("{:02}", self.hour),
            'I' => format!("{hour12:02}"),
            'M' => format!("{:02}", self.minute),
            'S' => format!("{:02}", self.second),
            'p' => if self.hour < 12 { "AM" } else { "PM" }.to_string(),
            'F' => format!("{}-{:02}-{:02}", self.year, self.month + 1, self.day),
            'T' => format!("{:02}:{:02}:{:02}", self.hour, self.minute, self.second),
            '%' => "%".to_string(),
            other => format!("%{other}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::strftime;

    /// Expected values printed by Python's `datetime.fromtimestamp(s, timezone.utc).strftime(format)`.
    #[test]
    fn dates_are_those_of_python() {
        assert_eq!(strftime(1_732_395_723, "%d %b %Y, %A %H:%M:%S"), "23 Nov 2024, Saturday 21:02:03");
        assert_eq!(strftime(1_709_210_096, "%Y-%m-%d %j %I:%M %p %a %B %y"), "2024-02-29 060 12:34 PM Thu February 24");
        assert_eq!(strftime(1_767_225_599, "%-d %e %F %T %%"), "31 31 2025-12-31 23:59:59 %");
        assert_eq!(strftime(0, "%-d %e %w"), "1  1 4");
        assert_eq!(strftime(951_782_400, "%F"), "2000-02-29");
        assert_eq!(strftime(4_107_542_400, "%F"), "2100-03-01");
    }
}
